"""`milepost verify` without a replay: what a person sees of a whole run and of a damaged one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from milepost.cli.main import run as milepost
from tests.training import events, start, wait_for_step


def test_a_whole_run_is_said_to_be_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert milepost(["verify", str(run)]) == 0
    out, err = capsys.readouterr()
    assert f"{run}: 4 checkpoints, 2 with a train state" in out
    assert "12 steps in 1 segment\n" in out
    assert out.endswith("every file is as its manifest says, and the history agrees\n")
    assert err == ""


def test_damage_is_listed_a_line_each_and_ends_with_4(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "step-00000003" / "config.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000012" / "train_state")
    assert milepost(["verify", str(run)]) == 4
    out, err = capsys.readouterr()
    first, second, *_ = out.splitlines()
    assert first.startswith("checkpoints/step-00000003/config.json: is missing; ")
    assert second.startswith("checkpoints/step-00000012/train_state: is missing, and the history ")
    assert "all is well" not in out
    assert f"error: {run}: 2 findings, nothing was changed" in err


def test_json_is_one_document_for_whole_and_damaged_runs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert milepost(["verify", str(run), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["is_whole"], whole["findings"], whole["last_step"]) == (True, [], 12)
    (run / "checkpoints" / "step-00000003" / "config.json").unlink()
    assert milepost(["verify", str(run), "--json"]) == 4
    damaged = json.loads(capsys.readouterr().out)
    assert damaged["is_whole"] is False
    assert damaged["findings"][0]["place"] == "checkpoints/step-00000003/config.json"


def test_a_checkpoint_is_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "step-00000012"
    assert milepost(["verify", str(folder)]) == 2
    assert f"{folder} is a model folder, not a run" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_may_train_while_it_is_verified(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = ("--train.total_steps", "100000", "--checkpoint.every_steps", "20", "--ranks", "1")
    process = start(recipe, run, tiny_data, *endless)
    wait_for_step(run, 120)
    for _ in range(5):
        assert milepost(["verify", str(run)]) == 0
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert milepost(["verify", str(run), "--replay"]) == 0
    assert events(run, "replayed") == []
