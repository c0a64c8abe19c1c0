"""The faults of `chaos.py`: some meet a segment while it runs, others its files while none does."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from milepost.core.files import read_json_lines
from milepost.runs.layout import RunLayout

GIVE_UP_SECONDS = 120.0
"""A segment that has not ended so long after its fault hangs, which is a failure."""


@dataclass(frozen=True)
class Segment:
    """A training process of a process group of its own, and the run it works on.

    Attributes:
        num_steps_before: step events in the history when it started.
    """

    process: subprocess.Popen[bytes]
    layout: RunLayout
    num_steps_before: int

    def num_steps(self) -> int:
        """Step events that it has added."""
        return num_step_events(self.layout) - self.num_steps_before

    def ranks(self) -> list[int]:
        """The ids of its ranks, lowest rank first; none where they are not started yet."""
        answer = subprocess.run(
            ["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, text=True
        )
        return [int(word) for word in answer.stdout.split()]

    def signal_all(self, signum: int) -> None:
        """To the launcher and its ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def signal_one(self, signum: int, *, source: random.Random) -> None:
        """To one of the ranks, or to the launcher where there is none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(source.choice(self.ranks() or [self.process.pid]), signum)

    def end(self) -> int:
        """Waits for its own end; the exit code.

        Raises:
            TimeoutError: it hangs; it was killed.
        """
        try:
            return self.process.wait(GIVE_UP_SECONDS)
        except subprocess.TimeoutExpired as late:
            self.signal_all(signal.SIGKILL)
            self.process.wait()
            raise TimeoutError(f"no end in {GIVE_UP_SECONDS:.0f} s after the fault") from late


def num_step_events(layout: RunLayout) -> int:
    """Step events in the history, those of steps that were run again too."""
    return layout.events.read_bytes().count(b'"kind":"step"') if layout.events.exists() else 0


def kill_all(segment: Segment, source: random.Random) -> None:
    segment.signal_all(signal.SIGKILL)


def kill_a_rank(segment: Segment, source: random.Random) -> None:
    segment.signal_one(signal.SIGKILL, source=source)


def terminate(segment: Segment, source: random.Random) -> None:
    segment.process.terminate()


def terminate_all(segment: Segment, source: random.Random) -> None:
    segment.signal_all(signal.SIGTERM)


def ctrl_c(segment: Segment, source: random.Random) -> None:
    segment.signal_all(signal.SIGINT)


def ctrl_c_twice(segment: Segment, source: random.Random) -> None:
    segment.signal_all(signal.SIGINT)
    time.sleep(source.uniform(0.0, 0.3))
    segment.signal_all(signal.SIGINT)


def freeze_then_kill(segment: Segment, source: random.Random) -> None:
    segment.signal_one(signal.SIGSTOP, source=source)
    time.sleep(source.uniform(0.1, 2.0))
    segment.signal_all(signal.SIGKILL)


def freeze(segment: Segment, source: random.Random) -> None:
    """One of two ranks or more: the others have to find out. A single one is let go on, and so
    is one that has not joined yet: the others have patience with that.
    """
    is_noticed = segment.num_steps() > 0 and len(segment.ranks()) > 1
    segment.signal_one(signal.SIGSTOP, source=source)
    if not is_noticed:
        time.sleep(1.0)
        segment.signal_all(signal.SIGCONT)
        segment.process.terminate()


def fill_disk(segment: Segment, source: random.Random) -> None:
    """Leaves less than a checkpoint needs, until the segment has ended."""
    root = segment.layout.root
    filler = root.parent / "filler"
    try:
        left = source.randrange(0, 400_000)
        with filler.open("wb") as file:
            while (free := shutil.disk_usage(root).free) > left:
                with contextlib.suppress(OSError):  # what the training writes meanwhile is gone
                    os.posix_fallocate(file.fileno(), filler.stat().st_size, free - left)
        segment.end()
    finally:
        filler.unlink()


RUNNING: dict[str, Callable[[Segment, random.Random], None]] = {
    "kill_all": kill_all,
    "kill_a_rank": kill_a_rank,
    "terminate": terminate,
    "terminate_all": terminate_all,
    "ctrl_c": ctrl_c,
    "ctrl_c_twice": ctrl_c_twice,
    "freeze_then_kill": freeze_then_kill,
    "freeze": freeze,
    "fill_disk": fill_disk,
}


def good_checkpoints(layout: RunLayout, *, damaged: set[int]) -> list[int]:
    """The steps of the checkpoints that can be gone on from, oldest first."""
    states = layout.checkpoints.glob("step-*/train_state/manifest.json")
    return sorted({int(path.parents[1].name[5:]) for path in states} - damaged)


def damage_newest(layout: RunLayout, source: random.Random, *, damaged: set[int]) -> str | None:
    """Damages a file of the newest good checkpoint, where there is another; says how."""
    good = good_checkpoints(layout, damaged=damaged)
    if len(good) < 2:
        return None
    folder = layout.checkpoint(good[-1])
    file = source.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = file.read_bytes()
    how = source.choice(["truncated", "bit_flipped", "deleted", "extra_file"])
    if how == "truncated":
        os.truncate(file, source.choice([0, 1, len(data) // 2, len(data) - 1]))
    elif how == "bit_flipped":
        place = source.randrange(len(data))
        flipped = bytes([data[place] ^ (1 << source.randrange(8))])
        file.write_bytes(data[:place] + flipped + data[place + 1 :])
    elif how == "deleted":
        file.unlink()
    else:
        (file.parent / "stray.bin").write_bytes(b"stray")
    damaged.add(good[-1])
    return how


def tear_history(layout: RunLayout, source: random.Random) -> str | None:
    """Leaves the beginning of an event as the last line, as a loss of power does."""
    events, _ = read_json_lines(layout.events)
    if not events:
        return None
    line = layout.events.read_bytes().splitlines()[-1]
    with layout.events.open("ab") as file:
        file.write(line[: source.randrange(1, len(line))])
    return "torn_history"
