"""The record of exact answers: counts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milepost.core.errors import CheckpointError
from milepost.runs.exact_answers import (
    ExactAnswer,
    ExactAnswers,
    ExactCount,
    read_exact_answers,
    write_exact_answers,
)
from milepost.trajectory.sections.tuning import exact_words


def answer(group: str, kind: str, *, before: str, after: str) -> ExactAnswer:
    return ExactAnswer(group, kind, "Who?", expected="Ann.", before=before, after=after)


FOUND = ExactAnswers(
    "key",
    12,
    (
        answer("seen", "who", before="Ann.", after="Ann."),
        answer("seen", "when", before="", after="Ann."),
        answer("seen", "who", before="", after="Ann. Ann."),
        answer("new", "when", before="", after="ann."),
    ),
)


def test_only_answers_equal_to_the_last_letter_count() -> None:
    assert FOUND.counts() == [ExactCount("seen", 3, 1, 2), ExactCount("new", 1, 0, 0)]
    assert FOUND.counts(kind="when") == [ExactCount("seen", 1, 0, 1), ExactCount("new", 1, 0, 0)]
    assert FOUND.counts(kind="order") == []


def test_a_report_tells_each_group_in_a_sentence() -> None:
    assert exact_words(FOUND) == "seen 2 of 3, before 1; new 0 of 1, before 0"


def test_what_is_written_is_read_back_with_its_counts_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "exact_answers.json"
    assert read_exact_answers(path) is None
    write_exact_answers(path, FOUND)
    assert read_exact_answers(path) == FOUND
    plain = json.loads(path.read_text())
    assert plain["v"] == 1
    assert plain["counts"][0] == {"group": "seen", "n": 3, "before": 1, "after": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "exact_answers.json"),
        ("[]", "does not hold what it should"),
        ('{"v": 1, "key": "k", "step": 1}', "does not hold what it should"),
        ('{"v": 1, "key": "k", "step": 1, "answers": [{"group": "a"}]}', "does not hold"),
        ('{"v": 1, "key": "k", "step": 1, "answers": [{"group": 3}]}', "holds texts only"),
        ('{"v": 2, "key": "k", "step": 1, "answers": []}', "schema version 2"),
    ],
)
def test_a_damaged_or_later_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "exact_answers.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_exact_answers(path)
    assert said in str(caught.value)
    assert path.name in str(caught.value)
