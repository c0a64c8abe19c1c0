"""A rank that is asked from outside where it stands, and shows it, whatever it is doing.

The answer comes from the interpreter's own signal handler in C, since a rank that waits in a
collective or was frozen runs no Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from milepost.core.console import say

STACK_SIGNAL = signal.SIGUSR2
ANSWER_SECONDS = 0.3
"""What a rank has to write its stack, awake again if it was frozen."""

LONGEST_SHOW_SECONDS = 5.0


def answer_with_stack() -> None:
    """From here on this process writes its stack to its stderr when it is asked."""
    # Only of the thread that takes the signal: the main one, which trains.
    faulthandler.register(STACK_SIGNAL, file=2, all_threads=False)


def ask_for_stacks(mark: Path, *, rank: int) -> None:
    """Asks our launcher to show where the other ranks stand; waits until it has.

    Args:
        mark: what the launcher looks for, but for the rank's number at its end.
        rank: this one, which has said where it stands.
    """
    deadline = time.monotonic() + LONGEST_SHOW_SECONDS
    own = mark.with_name(f"{mark.name}-{rank}")
    with contextlib.suppress(OSError):
        own.touch()
        while own.exists() and time.monotonic() < deadline:
            time.sleep(ANSWER_SECONDS / 10)


def show_stacks_if_asked(mark: Path, ranks: Mapping[int, subprocess.Popen[bytes]]) -> bool:
    """Where a rank has asked, shows where those that have not stand; whether one has.

    Args:
        mark: of `ask_for_stacks`.
        ranks: that are there, by their number.
    """
    if not _asking(mark):
        return False
    time.sleep(ANSWER_SECONDS)  # those that wait for the same rank ask at nearly the same time
    asking = _asking(mark)
    for rank, process in ranks.items():
        if rank not in asking and process.poll() is None:
            _show_stack_of(process, rank=rank)
    for own in asking.values():
        own.unlink(missing_ok=True)
    return True


def _asking(mark: Path) -> dict[int, Path]:
    """The marks of the ranks that ask now, by their number."""
    return {int(own.name.rpartition("-")[2]): own for own in mark.parent.glob(f"{mark.name}-*")}


def _show_stack_of(rank_process: subprocess.Popen[bytes], *, rank: int) -> None:
    """Has a rank write where it stands."""
    say(f"rank {rank} stands here, the newest call first:")
    _signal_main_thread(rank_process.pid, STACK_SIGNAL)
    with contextlib.suppress(ProcessLookupError):
        rank_process.send_signal(signal.SIGCONT)
    time.sleep(ANSWER_SECONDS)


def _signal_main_thread(pid: int, signum: int) -> None:
    """Signals the thread that trains; nothing happens where the process is gone.

    Of a process that is frozen any thread may take what is sent to the process, once it wakes.
    """
    try:
        ctypes.CDLL(None).tgkill(pid, pid, int(signum))
    except AttributeError:  # of an old C library, or another system's
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
