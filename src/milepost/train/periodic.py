"""What happens every so many steps, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from milepost.checkpoint.state import Progress


@dataclass(frozen=True)
class Periodic:
    """An action that is due when `step` is a multiple of `every_steps`, and at the end.

    Attributes:
        every_steps: None means only at the end.
        action: called with where the run stands. It says True where it gave up because a stop
            was asked for; all ranks say the same.
        at_start: whether it also runs before the first update of this segment.
    """

    every_steps: int | None
    action: Callable[[Progress], bool | None]
    at_start: bool = False

    def is_due(self, step: int, *, last_step: int) -> bool:
        """Whether the action runs after `step` updates, of which there is one at least."""
        if step == last_step:
            return True
        return self.every_steps is not None and step % self.every_steps == 0
