"""Stops asked of a launcher: remembered until there are ranks, then passed on to them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, `kill`, a closed terminal, the warning that Slurm sends (`--signal=USR1@300`)."""


class StopRequests:
    """Takes the stop signals of this process for a `with` block; the main thread's only.

    The first signal of any kind asks the ranks to save and stop, a second Ctrl-C kills them.
    Nothing is said from here: a handler may interrupt another message.
    """

    def __init__(self) -> None:
        self._ranks: Sequence[subprocess.Popen[bytes]] = ()
        self._num_interrupts = 0
        self._is_requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for signum in STOP_SIGNALS:
            if signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
                continue  # nohup means it
            self._previous[signum] = signal.signal(signum, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @property
    def is_requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._is_requested

    @property
    def must_leave(self) -> bool:
        """Whether Ctrl-C was pressed again."""
        return self._num_interrupts >= 2

    def pass_on_to(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        """From here on these ranks get what is asked, and what was asked before."""
        self._ranks = ranks
        if self._is_requested:
            self._pass_on()

    def _take(self, signum: int, frame: FrameType | None) -> None:
        self._is_requested = True
        if signum == signal.SIGINT:
            self._num_interrupts += 1
        if self.must_leave and not self._ranks:
            raise KeyboardInterrupt
        self._pass_on()

    def _pass_on(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(signal.SIGKILL if self.must_leave else signal.SIGTERM)


@contextlib.contextmanager
def held_back_stops() -> Iterator[None]:
    """Stop signals wait for the end of the block; processes begun in it have them held back.

    A rank never lets them through, it looks whether one waits (`train/stop.py`): none is lost
    or deadly, from its first moment on.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
