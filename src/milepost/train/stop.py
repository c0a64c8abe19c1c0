"""Requests to stop: SIGTERM, SIGUSR1, a closed terminal and the first Ctrl-C save and leave, the
second Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal

from milepost.core.errors import LEFT_AT_ONCE_EXIT_CODE


class StopSignal:
    """Remembers that a stop was asked for; make it on the main thread, early.

    Under our launcher the stop signals come held back and stay so: one that waits is a stop that
    was asked for. What this process starts holds them back too, so that neither Ctrl-C at the
    terminal nor a `kill` of the whole group ends the compiler in the middle of its work.
    """

    def __init__(self) -> None:
        self._is_requested = False
        self._num_interrupts = 0
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        wanted = [s for s in ASKING if signal.getsignal(s) is not signal.SIG_IGN]  # nohup means it
        self._waited_for = {s for s in wanted if s in held_back}
        for signum in wanted:
            if signum not in held_back:
                signal.signal(signum, self._ask)
        if signal.SIGINT not in held_back:
            signal.signal(signal.SIGINT, self._interrupt)

    def is_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._is_requested or bool(self._waited_for & signal.sigpending())

    def _ask(self, signum: int, frame: object) -> None:
        self._is_requested = True

    def _interrupt(self, signum: int, frame: object) -> None:
        self._is_requested = True
        self._num_interrupts += 1
        if self._num_interrupts >= 2:
            os._exit(LEFT_AT_ONCE_EXIT_CODE)


ASKING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 is the warning that Slurm sends. A process that has no launcher answers Ctrl-C in a way
of its own.
"""
