"""Warns while there is still time: the disk will not take the next checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable

from milepost.checkpoint.state import Progress
from milepost.core.console import warn
from milepost.core.errors import StorageError
from milepost.core.files import free_bytes
from milepost.core.units import format_bytes
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout

LOOK_SECONDS = 60.0


class DiskWatch:
    """Looks at the free space every minute; warns once, and anew after there was enough.

    Args:
        layout: the run folder.
        needed_bytes: of the next checkpoint, some to spare among them.
        is_saving: whether a checkpoint is being written; what it leaves free is seen after it.
        events: of the run.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        layout: RunLayout,
        *,
        needed_bytes: int,
        is_saving: Callable[[], bool],
        events: EventWriter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout = layout
        self._needed_bytes = needed_bytes
        self._is_saving = is_saving
        self._events = events
        self._clock = clock
        self._next_look = 0.0
        self._has_warned = False

    def look(self, progress: Progress) -> None:
        """Looks, if it is time to; never stops a run, which the save itself does."""
        now = self._clock()
        if now < self._next_look or self._is_saving():
            return
        self._next_look = now + LOOK_SECONDS
        try:
            free = free_bytes(self._layout.root)
        except StorageError:
            return
        is_low = free < self._needed_bytes
        if is_low and not self._has_warned:
            warn(
                f"{format_bytes(free)} are free in {self._layout.root}, the next checkpoint needs "
                f"{format_bytes(self._needed_bytes)}: free some before it is due, or the run "
                "stops there"
            )
            self._events.append(
                "guard_warned",
                guard="disk",
                step=progress.step,
                free_bytes=free,
                needed_bytes=self._needed_bytes,
            )
        self._has_warned = is_low
