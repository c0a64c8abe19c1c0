"""The train state: everything beside the weights that an exact continuation needs.

There is no random state in it on purpose: every random choice of a run is a function of its
seed and the step.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from milepost.core.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """The numbers of a train state.

    Attributes:
        step: updates done.
        skipped: batches skipped so far; the next update uses `data_step = step + skipped`.
        tokens_seen: target tokens trained on.
        training_seconds: time spent in steps, over all segments.
        loss_scale: of float16; 1 elsewhere.
        steps_at_scale: updates since the scale last changed.
    """

    step: int = 0
    skipped: int = 0
    tokens_seen: int = 0
    training_seconds: float = 0.0
    loss_scale: float = 1.0
    steps_at_scale: int = 0

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
        progress = Progress(**values)
    except TypeError as error:
        raise CheckpointError(f"{where} is not a train state: {error}") from error
    for name, value in asdict(progress).items():
        expected = type(getattr(Progress(), name))
        is_number = isinstance(value, expected if expected is int else int | float)
        if not is_number or not 0 <= value < math.inf:
            raise CheckpointError(f"{where}: {name} is {value!r}")
    return progress
