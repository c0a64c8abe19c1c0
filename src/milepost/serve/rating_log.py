"""ratings.jsonl as the rating page follows it: what is new in it is read, the rest is kept.

A judge leaves tens of thousands of lines there, too many to read again at every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from milepost.core.errors import StorageError
from milepost.core.files import record_in, storage_errors
from milepost.runs.ratings import RatingRecord, append_rating, rating_in

SampleScores = Mapping[tuple[str, int], Mapping[str, int]]
"""Sample and repeat to criterion to score."""


class RatingLog:
    """The people's scores that count, and who is on record. Not safe for several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._num_read_bytes = 0
        self._scores: dict[str, dict[tuple[str, int], dict[str, int]]] = {}
        self._models: set[str] = set()

    def scores(self, rater: str) -> SampleScores:
        """The scores of a person.

        Raises:
            StorageError: the log cannot be read.
        """
        self._follow()
        return self._scores.get(rater, {})

    def people(self) -> list[str]:
        """Names of the people, first come first.

        Raises:
            StorageError: the log cannot be read.
        """
        self._follow()
        return list(self._scores)

    def models(self) -> set[str]:
        """Names of the models that are on record as raters.

        Raises:
            StorageError: the log cannot be read.
        """
        self._follow()
        return self._models

    def append(self, record: RatingRecord) -> None:
        """Appends one score.

        Raises:
            StorageError: it could not be written.
        """
        append_rating(self._path, record)

    def _follow(self) -> None:
        """Takes in the lines that were not there the last time."""
        with storage_errors(self._path, verb="read"):
            if not self._path.exists():
                self._forget(None)
                return
            if not self._path.is_file():  # a pipe would hold its reader for ever
                raise StorageError(f"cannot read {self._path}: it is not a regular file")
            state = self._path.stat()
            file = state.st_dev, state.st_ino
            if file != self._file or state.st_size < self._num_read_bytes:
                self._forget(file)
            if state.st_size == self._num_read_bytes:
                return
            with self._path.open("rb") as log:
                log.seek(self._num_read_bytes)
                *lines, unended = log.read().split(b"\n")
        for line in lines:
            self._take(line)
            self._num_read_bytes += len(line) + 1
        # It may be whole or half written: what it holds counts now, and is read again later.
        self._take(unended)

    def _forget(self, file: tuple[int, int] | None) -> None:
        self._file = file
        self._num_read_bytes = 0
        self._scores = {}
        self._models = set()

    def _take(self, line: bytes) -> None:
        content = record_in(line)
        record = None if content is None else rating_in(content)
        if record is None:
            return
        if record.rater_kind == "model":
            self._models.add(record.rater)
            return
        of_rater = self._scores.setdefault(record.rater, {})
        of_sample = of_rater.setdefault((record.sample_id, record.repeat), {})
        of_sample[record.criterion] = record.score
