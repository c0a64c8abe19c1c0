"""Answers before and after a fine-tuning: `compare.json`, the same questions put to both models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.core.errors import CheckpointError
from milepost.core.files import read_json_of_version, write_json

SCHEMA_VERSION = 1

STOPPED_BY_ITSELF = "end_of_text"
"""What `decoding.stopped` of a sample says of a model that ended its answer itself."""

_HINT = "delete it; the run's own milepost finetune command writes it anew"


@dataclass(frozen=True)
class Answer:
    """A question and what both models said; they are lines of samples.jsonl.

    Attributes:
        question: without the template.
        before: of the base.
        after: of the tuned model.
    """

    question: str
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """All that both models were asked.

    Attributes:
        key: hash of the models and of what they were asked.
        step: of the checkpoint that answered after.
        answers: a question each, in the recipe's order.
    """

    key: str
    step: int
    answers: tuple[Answer, ...]


def write_answers(path: Path, found: Answers) -> None:
    """Writes the file atomically.

    Raises:
        StorageError: it cannot be written.
    """
    write_json(path, {"v": SCHEMA_VERSION} | asdict(found))


def read_answers(path: Path) -> Answers | None:
    """The answers on record; None where there are none yet.

    Raises:
        CheckpointError: the file is damaged, or of a later version than this program.
        StorageError: it is there and cannot be read.
    """
    if not path.exists():
        return None
    values = read_json_of_version(path, version=SCHEMA_VERSION, error=CheckpointError)
    try:
        fields = _checked(values, dict)
        return Answers(
            key=_checked(fields["key"], str),
            step=_checked(fields["step"], int),
            answers=tuple(map(_answer, _checked(fields["answers"], list))),
        )
    except KeyError as missing:
        raise CheckpointError(f"{path} lacks {missing}", hint=_HINT) from missing
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}", hint=_HINT) from error


def is_answer(record: dict[str, Any]) -> bool:
    """Whether a line of samples.jsonl answers a question that was put by a chat template."""
    decoding = record.get("decoding")
    return isinstance(decoding, dict) and decoding.get("template") is not None


def length_in_words(record: dict[str, Any]) -> str:
    """How long an answer is and how it ended: "12 tokens, stopped by itself"."""
    token_ids, decoding = record.get("token_ids"), record.get("decoding")
    number = len(token_ids) if isinstance(token_ids, list) else None
    stopped = decoding.get("stopped") if isinstance(decoding, dict) else None
    if number is None or not isinstance(stopped, str):
        return "length unknown"
    ending = "stopped by itself" if stopped == STOPPED_BY_ITSELF else f"cut off ({stopped})"
    return f"{number:,} {'token' if number == 1 else 'tokens'}, {ending.replace('_', ' ')}"


def _answer(values: Any) -> Answer:
    fields = _checked(values, dict)
    return Answer(
        question=_checked(fields["question"], str),
        before=_record(fields["before"]),
        after=_record(fields["after"]),
    )


def _record(values: Any) -> dict[str, Any]:
    fields: dict[str, Any] = _checked(values, dict)
    _checked(fields["completion"], str)
    return fields


def _checked(value: Any, kind: type) -> Any:
    """A value of the kind it must be of.

    Raises:
        TypeError: it is of another.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"a {kind.__name__} should be there, found a {type(value).__name__}")
    return value
