"""Says where a rank stands shortly before torch ends it for a collective that hangs.

On GPUs (nccl) a collective that waits too long ends the process without a word of Python's; on
the CPU (gloo) it raises, and `reduce.py` says the same. The wait is seen where the host reads what
the step gave. A step that is only slow (the first, which compiles) is told of too, and goes on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from milepost.core.console import say
from milepost.core.stacks import frame_of_thread, stack_lines
from milepost.core.units import format_duration
from milepost.distributed.world import World

TOLD_FRACTION = 0.9
"""Of the time limit, after which the stack is shown."""

LOOK_SECONDS = 1.0


class Watchdog:
    """Watches the thread that makes it, by a thread of its own.

    Args:
        world: of this process; its time limit counts.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._limit = TOLD_FRACTION * world.timeout_seconds
        self._watched = threading.get_ident()
        self._since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The block may take the time limit."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        told: float | None = None
        soon = (self._world.timeout_seconds - self._limit) / 2
        while not self._ended.wait(min(LOOK_SECONDS, soon)):
            since = self._since
            if since is None or since == told or time.monotonic() - since < self._limit:
                continue
            told = since
            limit = format_duration(self._world.timeout_seconds)
            say(
                f"rank {self._world.rank} has been in one step for "
                f"{format_duration(time.monotonic() - since)}; where it waits for another rank, "
                f"torch ends it after {limit}. It stands here:"
            )
            for line in stack_lines(frame_of_thread(self._watched), without=__file__):
                say(line)
            self._world.mark_stalled()
