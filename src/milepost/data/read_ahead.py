"""Reads one batch ahead in a thread, and gives up on a batch that does not come."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from milepost.core.console import say
from milepost.core.errors import DataError
from milepost.core.stacks import frame_of_thread, stack_lines
from milepost.core.units import format_duration
from milepost.data.batch import Batch, Batches

SLOW_FRACTION = 0.5
"""Of the time limit, after which it is told that a batch is late."""

CLOSE_SECONDS = 5.0
"""How long a read that nobody waits for any more may hold up the end."""


class ReadAhead:
    """Batches that are read by a thread of their own, each while the one before is trained on.

    The thread ends with the process, wherever it stands: a read that hangs holds up nobody.

    Args:
        batches: read by that thread alone; closed with this object.
        timeout_seconds: how long a batch may take.
        slow: told the data step and the seconds waited, once a batch that is late.
        stalled: told before this object gives up.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        timeout_seconds: float,
        slow: Callable[[int, float], None] = lambda data_step, seconds: None,
        stalled: Callable[[], None] = lambda: None,
    ) -> None:
        self._batches = batches
        self._timeout_seconds = timeout_seconds
        self._slow = slow
        self._stalled = stalled
        self._is_stalled = False
        self._ahead: int | None = None
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._keep_reading, name="loader", daemon=True)
        self._thread.start()

    def batch(self, data_step: int) -> Batch:
        """The global batch of a step; begins to read the next.

        Raises:
            DataError: it cannot be read, or does not come in time.
        """
        if self._ahead != data_step:
            if self._ahead is not None:
                self._wait()  # after a rollback what was read ahead is not what is wanted
            self._wanted.put(data_step)
        self._ahead = data_step
        found = self._wait()
        self._ahead = None
        if isinstance(found, Exception):
            raise found
        self._wanted.put(data_step + 1)
        self._ahead = data_step + 1
        return found

    def close(self) -> None:
        """Ends the thread and closes the batches; of a read that hangs, neither."""
        self._wanted.put(None)
        self._thread.join(0.0 if self._is_stalled else CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._batches.close()

    def _keep_reading(self) -> None:
        """What the thread does."""
        while (data_step := self._wanted.get()) is not None:
            found: Batch | Exception
            try:
                found = self._batches.batch(data_step)
            except Exception as error:  # raised in the thread that waits for it
                found = error
            self._read.put(found)

    def _wait(self) -> Batch | Exception:
        """What the thread reads now, as soon as it is there."""
        assert self._ahead is not None
        soon = self._timeout_seconds * SLOW_FRACTION
        started = time.monotonic()
        try:
            return self._read.get(timeout=soon)
        except queue.Empty:
            self._slow(self._ahead, time.monotonic() - started)
        try:
            return self._read.get(timeout=self._timeout_seconds - soon)
        except queue.Empty:
            self._is_stalled = True
        say("the thread that reads the data stands here:")
        for line in stack_lines(frame_of_thread(self._thread.ident), without=__file__):
            say(line)
        self._stalled()
        raise DataError(
            f"the batch of data step {self._ahead} was not read in "
            f"{format_duration(self._timeout_seconds)}",
            hint="the disk or the network behind data.path does not answer; once it does, the "
            "same command goes on from the newest checkpoint. Where reading may take so long, "
            "raise guards.loader_timeout_seconds",
        )
