"""The run's history: one writer appends events, anyone reads them.

The only module that appends events. Kinds and their fields are those of docs/contract.md.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.files import append_json_line, fsync_file, read_json_lines, storage_errors

SCHEMA_VERSION = 1

Event = dict[str, Any]


def utc_now() -> str:
    """The time of day in UTC, ISO 8601, whole milliseconds."""
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class EventWriter:
    """Appends events of one segment. Only the process that holds the run's lock makes one."""

    path: Path
    segment: int

    def append(self, kind: str, **fields: Any) -> None:
        """Appends one event.

        Raises:
            StorageError: the line could not be written.
        """
        append_json_line(self.path, self._event(kind, fields))

    def append_durably(self, kind: str, **fields: Any) -> None:
        """As `append`, and the event outlasts a loss of power that comes after the call."""
        append_json_line(self.path, self._event(kind, fields), is_durable=True)

    def force(self) -> None:
        """Forces everything that was appended so far to the disk.

        Raises:
            StorageError: the disk fails.
        """
        if self.path.exists():
            with storage_errors(self.path):
                fsync_file(self.path)

    def _event(self, kind: str, fields: Event) -> Event:
        head = {"v": SCHEMA_VERSION, "kind": kind, "time": utc_now(), "segment": self.segment}
        return head | fields


@dataclass(frozen=True)
class History:
    """All events of a run in file order, and how many lines could not be read."""

    events: list[Event]
    num_bad_lines: int

    def of_kind(self, kind: str) -> Iterator[Event]:
        """Events of one kind, in file order."""
        return (event for event in self.events if event.get("kind") == kind)

    def latest_by_step(self, kind: str) -> dict[int, Event]:
        """Events of one kind by step; of two entries for a step the later in the file counts.

        What a rollback undid does not count.
        """
        events = (e for e in present_events(self.events) if e.get("kind") == kind)
        found = {e["step"]: e for e in events if isinstance(e.get("step"), int)}
        return dict(sorted(found.items()))

    @property
    def num_segments(self) -> int:
        """Segments begun so far."""
        return max((e.get("segment", 0) for e in self.of_kind("segment_started")), default=0)


def present_events(events: Sequence[Event]) -> list[Event]:
    """The events in file order without those of steps that a later rollback undid."""
    present = []
    last_step = math.inf
    for event in reversed(events):
        step = event.get("step")
        if not isinstance(step, int) or step <= last_step:
            present.append(event)
        if event.get("kind") == "rolled_back" and isinstance(event.get("to_step"), int):
            last_step = min(last_step, event["to_step"])
    return present[::-1]


def read_history(path: Path) -> History:
    """Reads an event log; a missing file is an empty history."""
    events, num_bad = read_json_lines(path)
    return History(events=events, num_bad_lines=num_bad)
