"""compare.json: what is written reads back, and what is damaged is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milepost.core.errors import CheckpointError
from milepost.inference.stream import END_OF_TEXT
from milepost.runs.answers import (
    STOPPED_BY_ITSELF,
    Answer,
    Answers,
    length_in_words,
    read_answers,
    write_answers,
)

SAID = {"completion": " Yes.", "token_ids": [1, 2], "decoding": {"stopped": "end_of_text"}}
WHOLE = {"v": 1, "key": "k", "step": 3, "answers": [{"question": "q", "before": SAID}]}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    assert read_answers(path) is None
    found = Answers("key", 12, (Answer("Who?", SAID, SAID | {"completion": ""}),))
    write_answers(path, found)
    assert json.loads(path.read_text())["v"] == 1
    assert read_answers(path) == found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "a dict should be there, found a list"),
        (json.dumps(WHOLE), "lacks 'after'"),
        (json.dumps(WHOLE | {"answers": None}), "a list should be there, found a NoneType"),
        (json.dumps(WHOLE | {"step": True}), "found a bool"),
        (json.dumps(WHOLE | {"answers": [3]}), "a dict should be there, found a int"),
        (
            json.dumps(WHOLE | {"answers": [{"question": "", "before": {}, "after": SAID}]}),
            "lacks 'completion'",
        ),
    ],
)
def test_a_damaged_file_is_said_with_what_is_wrong(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "compare.json"
    path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_answers(path)
    assert str(path) in caught.value.message
    assert words in caught.value.message


def test_a_file_of_a_later_program_is_said(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    path.write_text('{"v": 2, "answers": {}}')
    with pytest.raises(CheckpointError, match="schema version 2, this program reads 1") as caught:
        read_answers(path)
    assert "later one" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (SAID, "2 tokens, stopped by itself"),
        (SAID | {"token_ids": [1]}, "1 token, stopped by itself"),
        (
            SAID | {"token_ids": [], "decoding": {"stopped": "context"}},
            "0 tokens, cut off (context)",
        ),
        (
            SAID | {"token_ids": [1] * 1000, "decoding": {"stopped": "max_new_tokens"}},
            "1,000 tokens, cut off (max new tokens)",
        ),
        ({}, "length unknown"),
        (SAID | {"decoding": None}, "length unknown"),
    ],
)
def test_length_in_words(record: dict[str, Any], words: str) -> None:
    assert length_in_words(record) == words


def test_decoding_says_end_of_text_where_a_model_stops_by_itself() -> None:
    assert STOPPED_BY_ITSELF == END_OF_TEXT
