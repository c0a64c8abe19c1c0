"""Jumps of loss and norm, and checkpoints whose scores stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milepost.core.spikes import MIN_HISTORY
from milepost.runs.metric_names import TRAIN_LOSS, VAL_LOSS
from milepost.trajectory.benchmarks import NAMES
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.jumps import Jump, has_enough_steps
from milepost.trajectory.outliers import MIN_CHECKPOINTS, OddCheckpoint
from milepost.trajectory.sections.text_table import Column, TextTable, numbers
from milepost.trajectory.sections.wording import (
    NONE,
    capitalized,
    enumerate_words,
    metric_words,
    plain,
    plural,
    signed,
)
from milepost.trajectory.subject import Section

MAX_JUMPS_SHOWN = 20
MAX_CHECKPOINTS_SHOWN = 20


@dataclass(frozen=True)
class Spikes:
    """What the section shows; a table without rows is None."""

    jumps: TextTable | None
    jumps_note: str
    checkpoints: TextTable | None
    checkpoints_note: str


def spikes_section(
    run: Trajectory, *, jumps: Sequence[Jump], odd: Sequence[OddCheckpoint]
) -> Section | None:
    """The section; None for a run without steps and scores."""
    if not run.steps.steps and not run.benchmarks:
        return None
    content = Spikes(
        jumps=_jump_table(jumps[:MAX_JUMPS_SHOWN]) if jumps else None,
        jumps_note=_jumps_note(run, jumps),
        checkpoints=_odd_table(odd[:MAX_CHECKPOINTS_SHOWN]) if odd else None,
        checkpoints_note=_odd_note(run, odd),
    )
    title = "Spikes, and checkpoints that stand out"
    return Section("spikes", title, "sections/spikes.jinja", content)


def _jump_table(jumps: Sequence[Jump]) -> TextTable:
    rows = [
        (
            f"{jump.step:,}",
            capitalized(metric_words(jump.metric)),
            height_words(jump),
            plain(jump.z, decimals=1),
            recovery_words(jump),
            NONE if jump.segment is None else str(jump.segment),
            jump.cause,
            _batch(jump),
        )
        for jump in jumps
    ]
    columns = (
        *numbers("Step"),
        Column("Of"),
        *numbers("Height", "z"),
        Column("Back after"),
        *numbers("Segment"),
        Column("What happened near"),
        Column("Data step, batch"),
    )
    return TextTable("Jumps, the largest first", columns, tuple(rows))


def height_words(jump: Jump) -> str:
    """'+1.20 nats' for a loss, '+3.4' for a norm."""
    unit = " nats" if jump.metric in (TRAIN_LOSS, VAL_LOSS) else ""
    return signed(jump.height, decimals=2) + unit


def recovery_words(jump: Jump) -> str:
    """'12 steps', or that it never came back."""
    steps = jump.steps_to_recovery
    return "never" if steps is None else plural(steps, "step")


def _batch(jump: Jump) -> str:
    place = NONE if jump.data_step is None else f"{jump.data_step:,}"
    return place if jump.batch_sha256 is None else f"{place}\n{jump.batch_sha256[:12]}"


def _jumps_note(run: Trajectory, jumps: Sequence[Jump]) -> str:
    if not run.steps.steps:
        return "No steps are on record in which to look for jumps."
    if not jumps and not has_enough_steps(run):
        return (
            f"There are too few steps to look for jumps: {MIN_HISTORY} before one tell its level."
        )
    if not jumps:
        return "No jump of loss or gradient norm stands out from the steps before it."
    told = (
        "Height is counted over the median of the steps before; z is the same in robust standard"
        " deviations of those steps."
    )
    if len(jumps) > MAX_JUMPS_SHOWN:
        told += f" The {MAX_JUMPS_SHOWN} largest of {len(jumps):,} are shown."
    return told


def _odd_table(odd: Sequence[OddCheckpoint]) -> TextTable:
    rows = [
        (
            f"{checkpoint.step:,}",
            plain(checkpoint.z, decimals=1),
            enumerate_words([NAMES.get(name, name) for name in checkpoint.benchmarks]),
            checkpoint.words,
        )
        for checkpoint in odd
    ]
    columns = (*numbers("Step", "z"), Column("On"), Column("What is odd"))
    return TextTable("Checkpoints whose scores stand out", columns, tuple(rows))


def _odd_note(run: Trajectory, odd: Sequence[OddCheckpoint]) -> str:
    if not run.benchmarks:
        return ""
    if not odd and max(len(series.evaluations) for series in run.benchmarks) < MIN_CHECKPOINTS:
        return (
            "There are too few scored checkpoints to find one that stands out from its neighbors:"
            f" it takes {MIN_CHECKPOINTS} of a benchmark."
        )
    if not odd:
        return "No checkpoint's scores stand out from those of its neighbors."
    told = "Score such a checkpoint again before its numbers are trusted."
    if len(odd) > MAX_CHECKPOINTS_SHOWN:
        told += f" The first {MAX_CHECKPOINTS_SHOWN} of {len(odd):,} are shown."
    return told
