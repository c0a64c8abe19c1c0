"""The train state: everything beside the weights that an exact continuation needs.

There is no random state in it on purpose: every random choice of a run is a function of its
seed and the step.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from milepost.core.errors import CheckpointError


@dataclass(frozen=True)
class GuardNumbers:
    """What the guards remember, so that they judge after a resume as they would have.

    Attributes:
        losses: of the last applied updates, nats a token, oldest first.
        skips_in_a_row: batches skipped since the last applied update.
        spikes_in_a_row: applied updates whose loss stood out, since the last whose did not.
        rollbacks: of the run so far.
    """

    losses: tuple[float, ...] = ()
    skips_in_a_row: int = 0
    spikes_in_a_row: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class Progress:
    """The numbers of a train state.

    Attributes:
        step: updates done.
        skipped: batches skipped so far.
        tokens_seen: target tokens trained on.
        training_seconds: time spent in steps, over all segments.
        loss_scale: of float16; 1 elsewhere.
        steps_at_scale: updates since the scale last changed.
        data_shift: what a run made from another's checkpoint adds to its steps, where its place
            in the data is another than its place in the schedule; below zero where the data
            begin anew.
        guards: what the guards remember.
    """

    step: int = 0
    skipped: int = 0
    tokens_seen: int = 0
    training_seconds: float = 0.0
    loss_scale: float = 1.0
    steps_at_scale: int = 0
    data_shift: int = 0
    guards: GuardNumbers = GuardNumbers()

    @property
    def data_step(self) -> int:
        """Which batch the next update uses."""
        return self.step + self.data_shift + self.skipped

    def as_plain(self) -> dict[str, Any]:
        """The numbers as JSON holds them, exactly."""
        return asdict(self)


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds for training.

    Attributes:
        progress: the numbers.
        weights: master weights in float32 by parameter name.
        moments: optimizer tensors, "exp_avg.NAME" and "exp_avg_sq.NAME", float32.
        optimizer_step: updates the optimizer counts.
    """

    progress: Progress
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    optimizer_step: int


def progress_from_plain(values: Any, *, where: str) -> Progress:
    """Reads back what `Progress.as_plain` wrote.

    Raises:
        CheckpointError: a field is missing, unknown, of another type or out of range.
    """
    try:
        guards = GuardNumbers(**values.get("guards", {}))
        progress = Progress(**{**values, "guards": guards})
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is not a train state: {error}") from error
    _check_counts(progress, names=("guards", "data_shift"), where=where)
    if type(progress.data_shift) is not int or progress.data_step < 0:
        raise CheckpointError(f"{where}: data_shift is {progress.data_shift!r}")
    _check_counts(guards, names=("losses",), where=where)
    if not isinstance(guards.losses, list | tuple) or not all(map(_is_finite, guards.losses)):
        raise CheckpointError(f"{where}: losses is {guards.losses!r}")
    return replace(progress, guards=replace(guards, losses=tuple(map(float, guards.losses))))


def _check_counts(numbers: Progress | GuardNumbers, *, names: tuple[str, ...], where: str) -> None:
    """Raises where a field is not a number of its type, 0 at least; those of `names` are not."""
    for field in fields(numbers):
        value = getattr(numbers, field.name)
        expected = int if type(field.default) is int else int | float
        is_number = isinstance(value, expected) and not isinstance(value, bool)
        if field.name not in names and not (is_number and 0 <= value < math.inf):
            raise CheckpointError(f"{where}: {field.name} is {value!r}")


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
