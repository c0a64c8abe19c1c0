"""What the guards decide of one update: from its numbers and their memory, and nothing else.

The numbers are those that all ranks agreed on, so every rank decides the same. Nothing is read,
written or said here; what follows from a decision is carried out in `guarding.py`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

from milepost.checkpoint.state import GuardNumbers, Progress
from milepost.config.schema import GuardsSection
from milepost.core.spikes import MIN_HISTORY, robust_z
from milepost.runs.refusals import Refusals

Action = Literal["apply", "skip", "roll_back", "stop"]

DRIFT_STEPS = 20
"""First losses after a resume, whose median is held against the window from before it."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of an update.

    Attributes:
        action: "apply", or what is done in its place.
        why: "not finite", "spike", or "" where nothing is wrong.
        z: of the loss over the window before it; None where it was not worked out.
        numbers: the guards' memory after it, where it is applied or skipped.
    """

    action: Action
    why: str
    z: float | None
    numbers: GuardNumbers

    @property
    def is_applied(self) -> bool:
        """Whether the update may touch the weights."""
        return self.action == "apply"

    @property
    def begins_spike(self) -> bool:
        """Whether it is applied though it stands out, as the first of its row."""
        return self.is_applied and self.why == "spike" and self.numbers.spikes_in_a_row == 1


def judge(
    loss_nats: float, grad_norm: float, *, numbers: GuardNumbers, config: GuardsSection
) -> Verdict:
    """Decides of one update before it touches anything.

    Args:
        loss_nats: mean over the global batch; may be infinite or NaN.
        grad_norm: before clipping; the same.
        numbers: the guards' memory before it.
        config: of the run.
    """
    if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
        if config.nonfinite == "skip":
            return _skipped("not finite", None, numbers=numbers, config=config)
        return Verdict("stop", "not finite", None, numbers)
    z = _height(loss_nats, numbers=numbers, config=config)
    is_spike = z is not None and z > config.spike_z
    if is_spike and config.spike == "skip":
        return _skipped("spike", z, numbers=numbers, config=config)
    spikes = numbers.spikes_in_a_row + 1 if is_spike else 0
    if config.spike == "rollback" and spikes >= config.spike_patience:
        return _out_of_patience("spike", z, numbers=numbers, config=config)
    after = replace(
        numbers,
        losses=(*numbers.losses, loss_nats)[-config.spike_window :],
        skips_in_a_row=0,
        spikes_in_a_row=spikes,
    )
    return Verdict("apply", "spike" if is_spike else "", z, after)


def _height(loss_nats: float, *, numbers: GuardNumbers, config: GuardsSection) -> float | None:
    if config.spike == "off" or len(numbers.losses) < MIN_HISTORY:
        return None
    return robust_z(loss_nats, numbers.losses[-config.spike_window :])


def _skipped(why: str, z: float | None, *, numbers: GuardNumbers, config: GuardsSection) -> Verdict:
    if numbers.skips_in_a_row >= config.max_skips_in_a_row:
        return _out_of_patience(why, z, numbers=numbers, config=config)
    return Verdict("skip", why, z, after_skip(numbers))


def after_skip(numbers: GuardNumbers) -> GuardNumbers:
    """The guards' memory after a skipped batch; its loss is not part of it."""
    return replace(numbers, skips_in_a_row=numbers.skips_in_a_row + 1)


def _out_of_patience(
    why: str, z: float | None, *, numbers: GuardNumbers, config: GuardsSection
) -> Verdict:
    can_roll_back = config.spike == "rollback" and numbers.rollbacks < config.max_rollbacks
    return Verdict("roll_back" if can_roll_back else "stop", why, z, numbers)


def rollback_step(progress: Progress, *, why: str, every_steps: int, first_step: int) -> int:
    """The step that a rollback returns to: the last scheduled checkpoint before the trouble.

    Numbers that are not finite are taken for the work of the last update, where no spike says
    that it began earlier.

    Checkpoints of other steps, which stops leave, never count: they would not be there in a run
    that nobody stopped. No step is before the run's first, which may be another run's.

    Args:
        progress: before the update that is refused.
        why: of the verdict.
        every_steps: interval of the checkpoints.
        first_step: that the run began at.
    """
    num_bad = max(progress.guards.spikes_in_a_row, int(why == "not finite"))
    return max(first_step, (progress.step - num_bad) // every_steps * every_steps)


def recalled(progress: Progress, *, refusals: Refusals) -> Progress:
    """Where the run stands after what the history says of its next update: that its batch is
    skipped, or that a rollback led to this step.
    """
    while True:
        before = progress
        for rollback in refusals.rollbacks:
            is_due = rollback.to_step == progress.step
            if is_due and rollback.rollbacks > progress.guards.rollbacks:
                guards = replace(
                    progress.guards,
                    skips_in_a_row=0,
                    spikes_in_a_row=0,
                    rollbacks=rollback.rollbacks,
                )
                progress = replace(progress, skipped=rollback.skipped, guards=guards)
        if (progress.step + 1, progress.data_step) in refusals.skips:
            guards = after_skip(progress.guards)
            progress = replace(progress, skipped=progress.skipped + 1, guards=guards)
        if progress == before:
            return progress


class ResumeDrift:
    """Whether the first losses after a resume lie above those before it.

    Args:
        losses: the window that the train state holds; too short a one is no measure.
        limit: robust deviations; None: it is never told.
    """

    def __init__(self, losses: tuple[float, ...], *, limit: float | None) -> None:
        self._before = losses
        self._limit = limit
        self._is_over = limit is None or len(losses) < MIN_HISTORY
        self._after: list[float] = []

    def add(self, loss_nats: float) -> float | None:
        """Takes the loss of an applied update; the deviations, once, where they are too many."""
        if self._is_over:
            return None
        self._after.append(loss_nats)
        if len(self._after) < DRIFT_STEPS:
            return None
        self.end()
        z = robust_z(statistics.median(self._after), self._before)
        return z if self._limit is not None and z > self._limit else None

    def end(self) -> None:
        """Nothing more is told: what comes next is no continuation of the window."""
        self._is_over = True
