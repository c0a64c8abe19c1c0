"""A fine-tuning killed at any moment ends with the bits of one that nothing happened to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.finetuning import LORA, Tuning
from tests.training import (
    children_of,
    environment,
    events,
    kill_group,
    logged_steps,
    start_words,
    trained_sha256,
    wait_for_step,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

STEPS = ("--train.total_steps", "30", "--validation.every_steps", "15")


@pytest.mark.parametrize("kind", ["lora", "full", "adamw8bit"])
def test_a_killed_fine_tuning_goes_on_exactly_on_one_rank_and_on_two(
    tmp_path: Path, kind: str
) -> None:
    tuning, full = Tuning(tmp_path), kind != "lora"
    words = (*STEPS, "--finetune.held_out_fraction", "0.3", *({"lora": LORA}.get(kind, ())))
    if kind == "adamw8bit":
        pytest.importorskip("torchao")
        # All weights: the additions of a tiny model are too small to be held in 8 bits.
        words = (*words, "--optimizer.name", "adamw8bit")
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    tuning.train_here(undisturbed, *words, full=full)
    for at_step, ranks in ((4, 2), (13, 1)):
        process = start_words(tuning.command(run, *words, "--ranks", str(ranks), full=full))
        wait_for_step(run, at_step, timeout=300)
        assert len(children_of(process.pid)) == ranks
        kill_group(process)
    done = subprocess.run(
        tuning.command(run, *words, full=full),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert logged_steps(run) == logged_steps(undisturbed)
    assert trained_sha256(run, 30) == trained_sha256(undisturbed, 30)
    assert all(e["equal"] == e["compared"] > 0 for e in events(run, "replayed"))
    assert "stopped by itself" in done.stdout or "cut off" in done.stdout
    assert (run / "compare.json").exists()
