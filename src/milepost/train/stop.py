"""Requests to stop: SIGTERM, a closed terminal and the first Ctrl-C save and leave, the second
Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal

from milepost.core.errors import LEFT_AT_ONCE_EXIT_CODE
from milepost.distributed.stop_requests import STOP_SIGNALS


class StopSignal:
    """Remembers that a stop was asked for; make it on the main thread, early.

    Under our launcher SIGINT comes held back: the launcher alone answers Ctrl-C, and neither
    this process nor a compiler that it starts may die of the terminal's own.
    """

    def __init__(self) -> None:
        self._is_requested = False
        self._num_interrupts = 0
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if signal.SIGINT in held_back:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for signum, handler in (
            (signal.SIGTERM, self._ask),
            (signal.SIGHUP, self._ask),
            (signal.SIGINT, self._interrupt),
        ):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup means it
                signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

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
