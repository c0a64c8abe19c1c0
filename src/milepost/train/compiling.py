"""What compiling cost a segment, and whether it was taken from an earlier one."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.checkpoint.state import Progress
from milepost.core.console import say
from milepost.runs.events import EventWriter


@dataclass(frozen=True)
class Compiling:
    """Since the process started.

    Attributes:
        seconds: in which nothing else was done, forward and backward.
        parts: that were compiled, here or earlier; one of forward and backward each.
        parts_from_cache: of these, the ones that an earlier process had compiled.
    """

    seconds: float
    parts: int
    parts_from_cache: int

    def since(self, before: Compiling) -> Compiling:
        """What was added after `before`."""
        return Compiling(
            seconds=self.seconds - before.seconds,
            parts=self.parts - before.parts,
            parts_from_cache=self.parts_from_cache - before.parts_from_cache,
        )


class CompilingReport:
    """Tells the history and the person once, after the first update, which compiles everything."""

    def __init__(self, events: EventWriter) -> None:
        """Begins to count."""
        self._events = events
        self._before = _so_far()
        self._is_told = False

    def look(self, progress: Progress) -> None:
        """Tells it, if it was not told before.

        Raises:
            StorageError: the history cannot be written.
        """
        if self._is_told:
            return
        self._is_told = True
        done = _so_far().since(self._before)
        self._events.append(
            "compiled",
            step=progress.step,
            seconds=done.seconds,
            parts=done.parts,
            parts_from_cache=done.parts_from_cache,
        )
        say(_in_words(done))


def _so_far() -> Compiling:
    from torch._dynamo.utils import calculate_time_spent, counters  # slow to import

    found = counters["inductor"]
    from_cache = found["fxgraph_cache_hit"]
    return Compiling(
        seconds=calculate_time_spent().get("total_wall_time", 0.0),
        parts=from_cache + found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"],
        parts_from_cache=from_cache,
    )


def _in_words(done: Compiling) -> str:
    if done.parts and done.parts == done.parts_from_cache:
        return f"compiled code of an earlier start was taken up in {done.seconds:.0f} s"
    kept = "; the next start takes it up" if done.parts else ""
    return f"compiled in {done.seconds:.0f} s{kept}"
