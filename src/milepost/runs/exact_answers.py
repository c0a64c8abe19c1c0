"""Exact answers before and after a fine-tuning: `exact_answers.json`, questions with one answer.

Beside `compare.json`, which holds a few answers whole, this counts many that can be right or wrong.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.core.errors import CheckpointError
from milepost.core.files import read_json_of_version, write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ExactAnswer:
    """A question with the one answer that counts, and what both models said.

    Attributes:
        group: what the tuned model had seen of it.
        kind: what it asks for.
        question: without the template.
        expected: the right answer.
        before: of the base, without white space around.
        after: of the tuned model, likewise.
    """

    group: str
    kind: str
    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class ExactCount:
    """How many answers of a group were exact.

    Attributes:
        group: as `ExactAnswer.group`.
        n: questions.
        before: right answers of the base.
        after: right answers of the tuned model.
    """

    group: str
    n: int
    before: int
    after: int


@dataclass(frozen=True)
class ExactAnswers:
    """All that both models were asked.

    Attributes:
        key: hash of the models and of what they were asked.
        step: of the checkpoint that answered after.
        answers: groups one after the other.
    """

    key: str
    step: int
    answers: tuple[ExactAnswer, ...]

    def counts(self, *, kind: str | None = None) -> list[ExactCount]:
        """Right answers of each group, in the order of the answers.

        Args:
            kind: only questions of this kind; None: all.
        """
        asked = [answer for answer in self.answers if kind in (None, answer.kind)]
        counts = []
        for group in dict.fromkeys(answer.group for answer in asked):
            of_group = [answer for answer in asked if answer.group == group]
            before = sum(answer.before == answer.expected for answer in of_group)
            after = sum(answer.after == answer.expected for answer in of_group)
            counts.append(ExactCount(group, len(of_group), before, after))
        return counts


def write_exact_answers(path: Path, found: ExactAnswers) -> None:
    """Writes the file atomically; the counts stand in it for who reads it without this program.

    Raises:
        StorageError: it cannot be written.
    """
    counts = [asdict(count) for count in found.counts()]
    write_json(path, {"v": SCHEMA_VERSION, "counts": counts} | asdict(found))


def read_exact_answers(path: Path) -> ExactAnswers | None:
    """The answers on record; None where there are none yet.

    Raises:
        CheckpointError: the file is damaged, or of a later version than this program.
        StorageError: it is there and cannot be read.
    """
    if not path.exists():
        return None
    values = read_json_of_version(path, version=SCHEMA_VERSION, error=CheckpointError)
    try:
        return ExactAnswers(
            key=str(values["key"]),
            step=int(values["step"]),
            answers=tuple(map(_answer, values["answers"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not hold what it should ({error})",
            hint="delete it; milepost demo writes it anew",
        ) from error


def _answer(values: Any) -> ExactAnswer:
    if not isinstance(values, dict) or not all(isinstance(text, str) for text in values.values()):
        raise TypeError("an answer holds texts only")
    return ExactAnswer(**values)
