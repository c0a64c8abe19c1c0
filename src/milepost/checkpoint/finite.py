"""Whether a train state is finite: one that is not is never written."""

from __future__ import annotations

import torch

from milepost.checkpoint.state import TrainState
from milepost.core.errors import DivergedError


def refuse_what_is_not_finite(state: TrainState) -> None:
    """Looks at every weight and moment of a state on the host.

    Raises:
        DivergedError: names the first tensor with a NaN or an infinity in it.
    """
    for tensors in (state.weights, state.moments):
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise DivergedError(
                    f"step {state.progress.step}: {name} is not finite after the update; the "
                    "checkpoint was not written and earlier ones are as they were",
                    hint="lower optimizer.learning_rate or optimizer.weight_decay, lengthen the "
                    "warm-up, or go on from an earlier checkpoint with other settings",
                )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; codes of 8 bits always are finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # One pass and no copy: a NaN is both the least and the greatest.
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
