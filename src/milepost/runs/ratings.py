"""Ratings of completions: what is rated, by whom, and the log of it.

One line of ratings.jsonl is one score of one criterion. Of two lines of one rater for one sample,
criterion and repeat the later counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from milepost.core.files import append_json_line, read_json_lines

SCHEMA_VERSION = 1

RaterKind = Literal["person", "model"]

LOWEST_SCORE, HIGHEST_SCORE = 0, 10


@dataclass(frozen=True)
class Criterion:
    """One of the rubric's qualities.

    Attributes:
        key: as records name it.
        name: as people read it.
        question: what the rater answers.
    """

    key: str
    name: str
    question: str


RUBRIC = (
    Criterion(
        "coherence", "Coherence", "Does it follow from the prompt, each thought from the last?"
    ),
    Criterion("fluency", "Fluency", "Is it grammatical, natural and easy to read?"),
    Criterion("relevance", "Relevance", "Does it stay with what the prompt began?"),
    Criterion("factual_accuracy", "Factual accuracy", "Is what it states true?"),
    Criterion("depth", "Depth", "Does it go into its subject, and is it complete?"),
    Criterion("creativity", "Creativity", "Is there thought in it beyond the commonplace?"),
)
"""The six criteria of the paper's section III, in the order of its Table II."""

CRITERIA = tuple(criterion.key for criterion in RUBRIC)


@dataclass(frozen=True)
class RatingRecord:
    """One score.

    Attributes:
        sample_id: of the line of samples.jsonl that was rated.
        rater: who: a person's name, or a model's.
        rater_kind: what the rater is.
        criterion: of `CRITERIA`.
        score: 0 to 10.
        repeat: 0 for the first time the rater saw the sample, 1 for the second.
        time: UTC, ISO 8601.
    """

    sample_id: str
    rater: str
    rater_kind: RaterKind
    criterion: str
    score: int
    repeat: int
    time: str

    def as_line(self) -> dict[str, Any]:
        """The record as it is written."""
        return {"v": SCHEMA_VERSION} | asdict(self)


def append_rating(path: Path, record: RatingRecord) -> None:
    """Appends one score to ratings.jsonl.

    Raises:
        StorageError: the line could not be written.
    """
    append_json_line(path, record.as_line())


def read_ratings(path: Path) -> tuple[list[RatingRecord], int]:
    """The ratings that count, in file order, and how many lines could not be read.

    Raises:
        StorageError: the log is there and cannot be read.
    """
    lines, num_bad = read_json_lines(path)
    found: dict[tuple[str, str, str, str, int], RatingRecord] = {}
    for line in lines:
        record = rating_in(line)
        if record is None:
            num_bad += 1
            continue
        rater = (record.rater_kind, record.rater)
        place = (record.sample_id, *rater, record.criterion, record.repeat)
        found.pop(place, None)
        found[place] = record
    return list(found.values()), num_bad


def rating_in(line: dict[str, Any]) -> RatingRecord | None:
    """The rating that a line of ratings.jsonl holds; None where it holds none."""
    sample_id, rater, time = (line.get(name) for name in ("sample_id", "rater", "time"))
    score, repeat = line.get("score"), line.get("repeat")
    version = line.get("v", SCHEMA_VERSION)
    is_sound = (
        isinstance(version, int)
        and version <= SCHEMA_VERSION
        and all(isinstance(value, str) and value for value in (sample_id, rater, time))
        and line.get("rater_kind") in ("person", "model")
        and line.get("criterion") in CRITERIA
        and all(isinstance(n, int) and not isinstance(n, bool) for n in (score, repeat))
    )
    if not is_sound or not LOWEST_SCORE <= line["score"] <= HIGHEST_SCORE or line["repeat"] < 0:
        return None
    names = ("sample_id", "rater", "rater_kind", "criterion", "score", "repeat", "time")
    return RatingRecord(**{name: line[name] for name in names})
