"""A training segment as a process of its own, watched through the run's history."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from milepost.core.errors import MilepostError
from milepost.runs.events import Event, read_history
from milepost.runs.layout import RunLayout

POLL_SECONDS = 0.2


class SegmentFailed(MilepostError):
    """The training process ended with an error; its last words are in the message."""


def run_segment(
    words: Sequence[str],
    *,
    run: Path,
    on_step: Callable[[Event], None],
    kill_when: Callable[[Event], bool],
) -> bool:
    """Runs `milepost WORDS` to its end, or kills it.

    Args:
        words: a `train` command for `run`.
        run: the run folder.
        on_step: called with the newest `step` event as the history grows.
        kill_when: asked with the same event; True ends the whole process group by SIGKILL.

    Returns:
        Whether it was killed.

    Raises:
        SegmentFailed: it ended with another exit code than 0.
    """
    layout = RunLayout(run)
    with tempfile.TemporaryFile() as talk:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "milepost.cli.main", *words],
            stdout=subprocess.DEVNULL,
            stderr=talk,
            start_new_session=True,
        )
        try:
            was_killed = _watch(process, layout, on_step=on_step, kill_when=kill_when)
        finally:
            if process.poll() is None:
                _kill(process)
        if process.returncode != 0 and not was_killed:
            talk.seek(0)
            last_words = talk.read().decode(errors="replace").strip().splitlines()[-4:]
            raise SegmentFailed(
                "training ended with exit code "
                f"{process.returncode}:\n  " + "\n  ".join(last_words),
                hint="run the same command again; it goes on from the newest checkpoint",
            )
    return was_killed


def _watch(
    process: subprocess.Popen[bytes],
    layout: RunLayout,
    *,
    on_step: Callable[[Event], None],
    kill_when: Callable[[Event], bool],
) -> bool:
    num_seen = sum(1 for _ in read_history(layout.events).of_kind("step"))
    while True:
        has_ended = process.poll() is not None
        steps = list(read_history(layout.events).of_kind("step"))
        if len(steps) > num_seen:
            num_seen = len(steps)
            on_step(steps[-1])
            if not has_ended and kill_when(steps[-1]):
                _kill(process)
                return True
        if has_ended:
            return False
        time.sleep(POLL_SECONDS)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
