"""Follows a run's history while another process appends to it."""

from __future__ import annotations

from pathlib import Path

from milepost.core.files import record_in
from milepost.runs.events import Event


class NewEvents:
    """The events of a history as it grows, each given once.

    Args:
        path: the event log; it may not be there yet.
        start_byte: where to begin.
    """

    def __init__(self, path: Path, *, start_byte: int = 0) -> None:
        self._path = path
        self._num_bytes_read = start_byte

    def read(self) -> list[tuple[int, Event]]:
        """The events of the whole lines that were appended since the last call.

        A line that holds no event is skipped.

        Returns:
            Each with the number of bytes from the start of the log to the end of its line.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._num_bytes_read)
                appended = file.read()
        except FileNotFoundError:
            return []
        events = []
        # The last piece is what a writer has not ended yet.
        for line in appended.split(b"\n")[:-1]:
            self._num_bytes_read += len(line) + 1
            event = record_in(line)
            if event is not None:
                events.append((self._num_bytes_read, event))
        return events
