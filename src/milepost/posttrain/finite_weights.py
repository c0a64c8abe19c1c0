"""The refusal of weights that are not finite, of which nothing can be said or made."""

from __future__ import annotations

from pathlib import Path

from milepost.core.errors import CheckpointError
from milepost.model.llama import Llama


def refuse_not_finite(model: Llama, *, folder: Path) -> None:
    """Refuses a model with a weight that is infinite or not a number.

    Args:
        model: on any device.
        folder: where it was read.

    Raises:
        CheckpointError: names the first such weight.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(
                f"{folder}: {name} has values that are not finite",
                hint="its training diverged, or the file is damaged; take another checkpoint",
            )
