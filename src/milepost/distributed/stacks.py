"""A rank that is asked from outside where it stands, and shows it, whatever it is doing.

The answer comes from the interpreter's own signal handler in C, since a rank that waits in a
collective or was frozen runs no Python.
"""

from __future__ import annotations

import contextlib
import faulthandler
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
    # The kernel gives a signal to the main thread, which is the one that trains.
    faulthandler.register(STACK_SIGNAL, file=2, all_threads=False)


def ask_for_stacks(mark: Path, *, rank: int) -> None:
    """Asks our launcher to show where the other ranks stand; waits until it has.

    Args:
        mark: what the launcher looks for.
        rank: this one, which has said where it stands.
    """
    deadline = time.monotonic() + LONGEST_SHOW_SECONDS
    with contextlib.suppress(OSError):
        written = mark.with_name(f"{mark.name}-{rank}")
        written.write_text(str(rank))
        written.rename(mark)
        while mark.exists() and time.monotonic() < deadline:
            time.sleep(ANSWER_SECONDS / 10)


def show_stacks_if_asked(mark: Path, ranks: Mapping[int, subprocess.Popen[bytes]]) -> bool:
    """Where a rank has asked, shows where the others stand; whether one has.

    Args:
        mark: of `ask_for_stacks`.
        ranks: that are there, by their number.
    """
    try:
        asking = mark.read_text()
    except OSError:
        return False
    for rank, process in ranks.items():
        if str(rank) != asking:
            _show_stack_of(process, rank=rank)
    mark.unlink(missing_ok=True)
    return True


def _show_stack_of(rank_process: subprocess.Popen[bytes], *, rank: int) -> None:
    """Has a rank write where it stands."""
    say(f"rank {rank} stands here, the newest call first:")
    with contextlib.suppress(ProcessLookupError):
        rank_process.send_signal(STACK_SIGNAL)
        rank_process.send_signal(signal.SIGCONT)
    time.sleep(ANSWER_SECONDS)
