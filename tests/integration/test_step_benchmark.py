"""benchmarks/step.py: a rehearsal of the comparison with a tiny model, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training import TINY_RECIPE, environment

STEP = Path(__file__).resolve().parents[2] / "benchmarks" / "step.py"
SMALL = ("train.global_batch_tokens=256", "train.microbatch_rows=2", "train.compile=false")


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    recipe = folder / "tiny.toml"
    recipe.write_text(TINY_RECIPE)
    command = [sys.executable, str(STEP), "--recipe", str(recipe), "--cores", "1", *words]
    for override in SMALL:
        command += ["--override", override]
    command += ["--folder", str(folder / "work")]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def _rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
def test_milepost_and_transformers_are_seen_to_do_the_same_work(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    words = ("--contenders", "milepost", "transformers", "--ranks", "2", "--steps", "2")
    own, peer = _rows(_run(tmp_path, *words))
    assert (own["name"], own["processes"], own["is_exact"]) == ("milepost", 2, True)
    assert (peer["name"], peer["processes"], peer["is_exact"]) == ("transformers", 1, False)
    assert own["malloc"] == peer["malloc"] and "mmap_max=0" in own["malloc"]
    assert own["ratio"] == 1
    assert peer["ratio"] == pytest.approx(own["tokens_per_second"] / peer["tokens_per_second"])
    for row in (own, peer):
        assert len(row["all_tokens_per_second"]) == 2
        assert row["share_of_gemm_peak"] > 0 and row["peak_bytes"] > 2**26
        assert row["cpu_seconds"] > 0
    # Three updates in bfloat16, 8 bits, of a loss of ln(512).
    assert len(own["losses_nats"]) == 3
    assert own["losses_nats"] == pytest.approx(peer["losses_nats"], abs=2e-3)


def test_what_accumulation_costs_is_measured_against_its_microbatches(tmp_path: Path) -> None:
    (row,) = _rows(_run(tmp_path, "--questions", "accumulation", "--steps", "1"))
    assert row["microbatches"] == 8 and len(row["turns"]) == 1
    (turn,) = row["turns"]
    assert turn["alone_seconds"] > 0 and turn["update_seconds"] > 0
    assert row["extra_share"] == turn["update_seconds"] / turn["alone_seconds"] - 1


@pytest.mark.skipif(importlib.util.find_spec("litgpt") is not None, reason="litgpt is installed")
def test_a_peer_whose_package_is_missing_is_not_left_out(tmp_path: Path) -> None:
    done = _run(tmp_path, "--contenders", "milepost", "litgpt")
    assert done.returncode == 2 and not done.stdout
    assert f"litgpt: {sys.executable} cannot import litgpt" in done.stderr
    assert "--python litgpt=PATH/bin/python" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--python", "litgpt"), "wants NAME=PATH"),
        (("--python", "litgpt=/nowhere/python"), "No such file or directory"),
        (("--paper-code", "/nowhere"), "has no models/llama.py"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    contender = "litgpt" if words[0] == "--python" else "milepost"
    done = _run(tmp_path, "--contenders", contender, *words)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr
