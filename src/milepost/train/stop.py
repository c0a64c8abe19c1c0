"""Requests to stop: SIGTERM, a closed terminal and the first Ctrl-C save and leave, the second
Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal

from milepost.core.errors import LEFT_AT_ONCE_EXIT_CODE


class StopSignal:
    """Remembers that a stop was asked for; make it on the main thread, early."""

    def __init__(self) -> None:
        self._is_requested = False
        self._num_interrupts = 0
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup means it
                signal.signal(signum, self._ask)
        signal.signal(signal.SIGINT, self._interrupt)

    def is_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._is_requested

    def _ask(self, signum: int, frame: object) -> None:
        self._is_requested = True

    def _interrupt(self, signum: int, frame: object) -> None:
        self._is_requested = True
        self._num_interrupts += 1
        if self._num_interrupts >= 2:
            os._exit(LEFT_AT_ONCE_EXIT_CODE)
