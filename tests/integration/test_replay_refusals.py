"""Replays that cannot be made, and replays that fail: each with its reason and its exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.main import run as milepost
from milepost.runs.events import EventWriter
from tests.training import SHORT, left_beside, train_here


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--replay", "--from-step", "6"], 4, "no train state in its checkpoint of step 6"),
        (["--replay", "--from-step", "7"], 4, "has no checkpoint of step 7"),
        (["--replay", "--from-step", "12"], 4, "has no checkpoint after step 12"),
        (["--replay", "--ranks", "3"], 2, "2 lanes cannot be dealt to 3 ranks"),
        (["--replay", "--data", "nowhere"], 3, "nowhere holds no prepared data"),
        (["--ranks", "2"], 2, "--ranks says how to replay"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_a_reason(
    run: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert milepost(["verify", str(run), *words]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "hint: " in err
    assert left_beside(run) == []


def test_a_run_with_one_train_state_says_from_where_it_can_be_replayed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000009" / "train_state")
    EventWriter(run / "events.jsonl", segment=1).append("train_state_dropped", step=9)
    assert milepost(["verify", str(run), "--replay"]) == 4
    err = capsys.readouterr().err
    assert "no checkpoint with a train state that another one follows" in err
    assert "checkpoints with a train state: 12; --from-step 0 starts from the first step" in err


def test_data_that_was_moved_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from milepost.runs.layout import RunLayout
    from milepost.runs.manifest import read_run_manifest, write_run_manifest

    layout = RunLayout(run)
    manifest = read_run_manifest(layout)
    gone = manifest.config.data.model_copy(update={"path": "/gone"})
    config = manifest.config.model_copy(update={"data": gone})
    write_run_manifest(layout, type(manifest)(**{**vars(manifest), "config": config}))
    assert milepost(["verify", str(run), "--replay"]) == 3
    err = capsys.readouterr().err
    assert "/gone holds no prepared data" in err
    assert "hint: say with --data DIR" in err


def test_a_full_disk_is_refused_with_numbers_before_anything_is_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from milepost.experiments import scratch_copy

    monkeypatch.setattr(scratch_copy, "free_bytes", lambda path: 1 << 20)
    assert milepost(["verify", str(run), "--replay"]) == 7
    err = capsys.readouterr().err
    assert "no room for the replay's copy" in err
    assert "has 1.0 MiB free, " in err


def test_a_checkpoint_without_weights_is_refused_before_the_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "checkpoints" / "step-00000012"
    (folder / "model.safetensors").unlink()
    head = json.loads((folder / "manifest.json").read_text())
    del head["files"]["model.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(head, indent=2) + "\n")
    assert milepost(["verify", str(run), "--replay"]) == 4
    assert f"{folder / 'model.safetensors'} is missing" in capsys.readouterr().err
    assert left_beside(run) == []


def test_a_recipe_that_changes_inside_the_range_is_refused(
    recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    keep = ("--checkpoint.keep_train_state", "9")
    train_here(recipe, run, tiny_data, *SHORT, *keep, "--train.stop_at_step", "7")
    changed = ("--optimizer.learning_rate", "1e-3")
    train_here(recipe, run, tiny_data, *SHORT, *keep, *changed, override=True)
    shutil.move(run / "checkpoints" / "step-00000007", tmp_path / "aside")
    EventWriter(run / "events.jsonl", segment=1).append("checkpoint_quarantined", step=7)
    assert milepost(["verify", str(run), "--replay", "--from-step", "6"]) == 2
    err = capsys.readouterr().err
    assert "optimizer.learning_rate was changed from 0.003 to 0.001 at step 8" in err
    assert "inside steps 7 to 9" in err


def test_a_training_that_fails_says_nothing_of_the_bits(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from milepost.experiments import replay
    from milepost.experiments.segment_process import SegmentFailed

    def fail(*arguments: Any, **options: Any) -> bool:
        raise SegmentFailed(3, last_words=["error: shard 0 is damaged"])

    monkeypatch.setattr(replay, "run_segment", fail)
    assert milepost(["verify", str(run), "--replay"]) == 3
    err = capsys.readouterr().err
    assert "the replay's training ended with exit code 3:\n  error: shard 0 is damaged" in err
    assert "hint: this says nothing of the run's bits" in err
    assert left_beside(run) == []
