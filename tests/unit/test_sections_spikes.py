"""Jumps and checkpoints that stand out, as the page tells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.trajectory.collect import Trajectory, collect
from milepost.trajectory.jumps import Jump
from milepost.trajectory.outliers import OddCheckpoint
from milepost.trajectory.sections.findings import jump_sentences
from milepost.trajectory.sections.spikes import MAX_JUMPS_SHOWN, spikes_section
from tests.made_runs import make_run


def jump(step: int = 512, *, metric: str = "train/loss", back: int | None = 12) -> Jump:
    return Jump(
        metric=metric,
        step=step,
        height=1.234,
        z=23.4,
        steps_to_recovery=back,
        segment=2,
        cause="12 steps after the resume at 500",
        data_step=511,
        batch_sha256="3fa9" * 16,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    made = make_run(tmp_path_factory.mktemp("run") / "calm", total_steps=30)
    made.start()
    made.train(1, 30)
    for step in range(24, 31):
        made.evaluate(step, "piqa", acc=0.5)
    return collect(made.layout.root)


def test_jump_is_told_with_size_time_cause_and_batch(run: Trajectory) -> None:
    section = spikes_section(run, jumps=[jump()], odd=[])
    assert section is not None
    assert section.content.jumps.rows == (
        (
            *("512", "Training loss", "+1.23 nats", "23.4", "12 steps", "2"),
            "12 steps after the resume at 500",
            "511\n3fa93fa93fa9",
        ),
    )


def test_norm_has_no_unit_and_a_jump_that_stays_says_so(run: Trajectory) -> None:
    section = spikes_section(run, jumps=[jump(metric="train/grad_norm", back=None)], odd=[])
    assert section is not None
    [row] = section.content.jumps.rows
    assert row[1:5] == ("Gradient norm", "+1.23", "23.4", "never")


def test_many_jumps_are_cut_and_the_rest_counted(run: Trajectory) -> None:
    jumps = [jump(step) for step in range(1, MAX_JUMPS_SHOWN + 6)]
    section = spikes_section(run, jumps=jumps, odd=[])
    assert section is not None
    assert len(section.content.jumps.rows) == MAX_JUMPS_SHOWN
    assert section.content.jumps_note.endswith("The 20 largest of 25 are shown.")


def test_calm_run_says_that_nothing_stands_out(run: Trajectory) -> None:
    section = spikes_section(run, jumps=[], odd=[])
    assert section is not None
    assert section.content.jumps is None and section.content.checkpoints is None
    assert "No jump of loss or gradient norm" in section.content.jumps_note
    assert "No checkpoint's scores" in section.content.checkpoints_note
    assert jump_sentences(run, jumps=[], odd=[]) == ["No jump of loss or gradient norm stands out."]


def test_too_few_steps_and_scores_to_judge_are_said_to_be_too_few(tmp_path: Path) -> None:
    made = make_run(tmp_path / "short", total_steps=20)
    made.start()
    made.train(1, 20)
    for step in range(15, 21):
        made.evaluate(step, "piqa", acc=0.5)
    short = collect(made.layout.root)
    section = spikes_section(short, jumps=[], odd=[])
    assert section is not None
    assert section.content.jumps_note.startswith("There are too few steps to look for jumps: 20")
    assert section.content.checkpoints_note.endswith("it takes 7 of a benchmark.")
    assert jump_sentences(short, jumps=[], odd=[]) == []


def test_odd_checkpoint_is_named_with_its_benchmarks(run: Trajectory) -> None:
    odd = [OddCheckpoint(300, ("piqa", "boolq"), -9.5, "lower than its neighbors on 2 of 2")]
    section = spikes_section(run, jumps=[], odd=odd)
    assert section is not None
    assert section.content.checkpoints.rows == (
        ("300", "−9.5", "PIQA and BoolQ", "lower than its neighbors on 2 of 2"),
    )
    assert jump_sentences(run, jumps=[], odd=odd)[-1] == (
        "Scores stand out from those of the neighbors at step 300."
    )


def test_summary_tells_the_largest_jump_of_a_loss(run: Trajectory) -> None:
    norm = jump(300, metric="train/grad_norm")
    [sentence] = jump_sentences(run, jumps=[norm, jump(), jump(600)], odd=[])
    assert sentence == (
        "Gradient norm jumped once and training loss jumped twice; the largest jump of training"
        " loss, +1.23 nats at step 512, was gone after 12 steps (12 steps after the resume at 500)."
    )


def test_run_without_steps_and_scores_has_no_such_section(tmp_path: Path) -> None:
    made = make_run(tmp_path / "empty")
    made.start()
    assert spikes_section(collect(made.layout.root), jumps=[], odd=[]) is None
