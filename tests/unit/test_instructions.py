"""Instruction data in every form: read alike, and what cannot be used named and counted."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from milepost.core.errors import DataError
from milepost.posttrain.instructions import read_conversations, split_held_out
from milepost.posttrain.ledger import REASONS, Drop, Ledger
from milepost.text.chat_template import Message

PAIRS = [("What is 2 + 2?", "4."), ("Name a color.", "Blue 🔵"), ("Why?\nbecause", "So.\n\nYes.")]
WANTED = [(Message("user", question), Message("assistant", answer)) for question, answer in PAIRS]

ALPACA: list[dict[str, Any]] = [
    {"instruction": PAIRS[0][0], "input": "", "output": PAIRS[0][1], "source": "x"},
    {"instruction": PAIRS[1][0] + " ", "output": "\n" + PAIRS[1][1]},
    {"instruction": "Why?", "input": "because", "output": PAIRS[2][1]},
]
MESSAGES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in PAIRS
]
SHAREGPT: list[dict[str, Any]] = [
    {"id": "1", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
    for q, a in PAIRS
]
FORMS = {"alpaca": ALPACA, "messages": MESSAGES, "sharegpt": SHAREGPT}


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzip(path: Path, rows: list[Any]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_parquet(path: Path, rows: list[Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[Any]], None]] = {
    "a.json": write_json,
    "a.jsonl": write_lines,
    "a.jsonl.gz": write_gzip,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_form_in_every_file_gives_the_same_conversations(
    tmp_path: Path, name: str, rows: list[Any]
) -> None:
    WRITERS[name](tmp_path / name, rows)
    conversations, ledger = read_conversations(str(tmp_path / name))
    assert [conversation.messages for conversation in conversations] == WANTED
    assert [(c.source, c.line) for c in conversations] == [
        (str(tmp_path / name), line) for line in (1, 2, 3)
    ]
    assert ledger == Ledger(num_rows=3)


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    write_json(tmp_path / "b.json", ALPACA[1:])
    write_lines(tmp_path / "a.jsonl", ALPACA[:1])
    (tmp_path / "readme.txt").write_text("not rows")
    conversations, ledger = read_conversations(str(tmp_path))
    assert [conversation.messages for conversation in conversations] == WANTED
    assert ledger.num_rows == 3


def test_a_system_message_and_several_turns_are_kept(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    write_lines(tmp_path / "a.jsonl", [row])
    ((conversation,), _) = read_conversations(str(tmp_path / "a.jsonl"))
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
    )


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_a_system_field_is_the_system_message_of_any_form(tmp_path: Path, rows: list[Any]) -> None:
    write_lines(
        tmp_path / "a.jsonl", [rows[0] | {"system": "Be brief. "}, rows[1] | {"system": ""}]
    )
    (first, second), _ = read_conversations(str(tmp_path / "a.jsonl"))
    assert first.messages == (Message("system", "Be brief."), *WANTED[0])
    assert second.messages == WANTED[1]


def test_an_empty_system_message_is_none(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": " "}, *MESSAGES[0]["messages"]]}
    write_lines(tmp_path / "a.jsonl", [row])
    ((conversation,), _) = read_conversations(str(tmp_path / "a.jsonl"))
    assert conversation.messages == WANTED[0]


def said(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def answered(instruction: Any, output: Any, **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output} | more


def called(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose last message calls tools."""
    *turns, last = row["messages"]
    return row | {"messages": [*turns, last | {"tool_calls": [{"id": 1}]}]}


UNUSABLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "no-output": ({"instruction": "a"}, "no_answer", "the answer, message 2, is empty"),
    "null-output": (answered("a", None), "no_answer", "the answer, message 2, is empty"),
    "blank-output": (answered("a", " \n"), "no_answer", "the answer, message 2, is empty"),
    "blank-instruction": (
        answered(" ", "b", input="c"),
        "empty_question",
        "the question, message 1, is empty",
    ),
    "number": (answered("a", 4), "not_text", "field 'output' is a number, not a text"),
    "input-list": (answered("a", "b", input=["c"]), "not_text", "field 'input' is a list"),
    "nul": (answered("a", "b\0"), "unusable_character", "holds a NUL character at character 1"),
    "surrogate": (answered("a\ud800", "b"), "unusable_character", "surrogate) at character 1"),
    "null-messages": ({"messages": None}, "no_turns", "field 'messages' is empty"),
    "no-messages": ({"messages": []}, "no_turns", "field 'messages' is empty"),
    "text-for-messages": ({"messages": "a"}, "no_turns", "field 'messages' is a text, not a list"),
    "text-for-a-message": ({"messages": ["a"]}, "not_text", "message 1 is a text, not an object"),
    "system-only": (said(("system", "a")), "no_turns", "there is neither question nor answer"),
    "role": (said(("tool", "a")), "unknown_role", "message 1 has 'role' \"tool\""),
    "no-role": (said((None, "a")), "unknown_role", "message 1 has 'role' null"),
    "parts": (
        said(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")),
        "not_text",
        "message 1 is a list, not a text",
    ),
    "answer-first": (
        said(("assistant", "a"), ("user", "b")),
        "out_of_order",
        "message 1 is of the assistant where the user takes the turn",
    ),
    "two-questions": (
        said(("system", "s"), ("user", "a"), ("user", "b"), ("assistant", "c")),
        "out_of_order",
        "message 3 is of the user where the assistant takes the turn",
    ),
    "system-later": (
        said(("user", "a"), ("system", "b")),
        "out_of_order",
        "message 2 is of the system where the assistant takes the turn",
    ),
    "question-last": (
        said(("user", "a"), ("assistant", "b"), ("user", "c")),
        "no_answer",
        "it ends with a question",
    ),
    "history": (
        answered("a", "b", history=[["c", "d"]]),
        "unread_field",
        'it has \'history\': [["c", "d"]]',
    ),
    "tool-calls": (called(MESSAGES[0]), "unread_field", "it has 'tool_calls': [{\"id\": 1}]"),
    "empty-turn": (
        said(("user", "a"), ("assistant", None), ("user", "c"), ("assistant", "d")),
        "no_answer",
        "the answer, message 2, is empty",
    ),
}


@pytest.mark.parametrize(("row", "reason", "what"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_row_that_cannot_be_used_is_left_out_and_counted(
    tmp_path: Path, row: dict[str, Any], reason: str, what: str
) -> None:
    rows = MESSAGES if "messages" in row else ALPACA
    write_lines(tmp_path / "a.jsonl", [rows[0], row, rows[1], row])
    conversations, ledger = read_conversations(str(tmp_path / "a.jsonl"))
    assert [conversation.messages for conversation in conversations] == WANTED[:2]
    assert [conversation.line for conversation in conversations] == [1, 3]
    assert (ledger.num_rows, ledger.num_used, ledger.counts) == (4, 2, {reason: 2})
    assert [drop.line for drop in ledger.drops] == [2, 4]
    assert what in ledger.drops[0].what
    assert ledger.summary() == f"2 of 4 rows used; left out: 2 {REASONS[reason]}"


def test_bytes_are_no_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [answered("a", b"b"), answered("a", b"c")])
    with pytest.raises(DataError, match="2 with a message that is not text") as caught:
        read_conversations(str(tmp_path / "a.parquet"))
    assert str(caught.value.hint).endswith("field 'output' is of type bytes, not a text")


def test_a_ledger_as_a_record_counts_all_and_lists_the_first() -> None:
    drops = tuple(Drop("a.jsonl", line, "no_answer", "empty") for line in range(1, 201))
    late = (Drop("a.jsonl", 201, "too_long", "9 tokens in a row of 8"),)
    record = Ledger(300, drops).with_drops(late).record()
    assert record["rows"] == 300
    assert record["used"] == 99
    assert record["left_out"] == {"no_answer": 200, "too_long": 1}
    assert [drop["line"] for drop in record["listed"]] == [*range(1, 101), 201]


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "mixed": (
        "a.jsonl",
        json.dumps(ALPACA[0]).encode() + b"\n" + json.dumps(SHAREGPT[0]).encode(),
        "a.jsonl:2 is of the form ShareGPT, the rows before it are of the form Alpaca",
    ),
    "other-row": (
        "a.jsonl",
        json.dumps(ALPACA[0]).encode() + b'\n{"text": "a"}',
        "a.jsonl:2 has none of its fields, the rows before it are of the form Alpaca",
    ),
    "unknown": (
        "a.jsonl",
        b'{"prompt": "a", "completion": "b"}',
        'of no known form; the first has the fields "prompt", "completion"',
    ),
    "all-unusable": (
        "a.jsonl",
        b'{"instruction": "a", "output": ""}\n' * 2,
        "can be used: 0 of 2 rows used; left out: 2 without an answer",
    ),
    "not-json": ("a.jsonl", b'{"instruction": "a", "output": "b"}\nx', "a.jsonl:2 is not JSON"),
    "not-an-object": ("a.jsonl", b"[1]", "a.jsonl:1 is not a JSON object"),
    "empty": ("a.jsonl", b"", "a.jsonl holds no rows"),
    "json-object": ("a.json", b'{"instruction": "a"}', "a.json is not a JSON list of rows"),
    "json-empty": ("a.json", b"[]", "a.json holds no rows"),
    "json-list-of-text": ("a.json", b'[{"a": 1}, "b"]', "a.json:2 is not a JSON object"),
    "json-torn": ("a.json", b'[{"instruction": "a"', "a.json is not JSON"),
    "json-nan": ("a.json", b"[NaN]", "a.json is not JSON: NaN is not a JSON number"),
    "json-deep": ("a.json", b"[" * 100_000, "a.json is nested too deep"),
    "json-not-utf8": ("a.json", b'["\xff"]', "a.json is not JSON: 'utf-8' codec"),
    "gzip": ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be read"),
    "parquet": ("a.parquet", b"not parquet", "a.parquet cannot be read as Parquet"),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_damaged_or_of_another_form_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_conversations(str(tmp_path / name))
    assert message in caught.value.message
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint


def test_the_first_row_of_its_form_may_be_one_without_an_answer(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"instruction": "a", "output": None}, ALPACA[0]])
    conversations, ledger = read_conversations(str(tmp_path / "a.jsonl"))
    assert [conversation.messages for conversation in conversations] == WANTED[:1]
    assert ledger.counts == {"no_answer": 1}


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no instruction data at owner/name") as caught:
        read_conversations("owner/name")
    assert "hf://datasets/owner/name" in str(caught.value.hint)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="is of a kind that is not read") as caught:
        read_conversations(str(tmp_path / "a.txt"))
    assert caught.value.hint == "read: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .json"


def test_what_is_held_out_follows_from_what_is_said_alone(tmp_path: Path) -> None:
    rows = [answered(f"question {number}", f"answer {number}") for number in range(1000)]
    write_lines(tmp_path / "a.jsonl", rows)
    write_json(tmp_path / "b.json", [*rows[500:], *rows[:500], *rows[:100]])
    first, _ = read_conversations(str(tmp_path / "a.jsonl"))
    second, _ = read_conversations(str(tmp_path / "b.json"))
    trained, held_out = split_held_out(first, fraction=0.2)
    assert 150 < len(held_out) < 250
    assert sorted([*trained, *held_out], key=lambda c: c.line) == first
    _, again = split_held_out(second, fraction=0.2)
    assert {c.sha256 for c in again} == {c.sha256 for c in held_out}
    _, more = split_held_out(first, fraction=0.4)
    assert {c.sha256 for c in held_out} < {c.sha256 for c in more}


@pytest.mark.parametrize(("fraction", "num_held_out"), [(0.0, 0), (1.0, 3)])
def test_none_or_all_can_be_held_out(tmp_path: Path, fraction: float, num_held_out: int) -> None:
    write_lines(tmp_path / "a.jsonl", ALPACA)
    conversations, _ = read_conversations(str(tmp_path / "a.jsonl"))
    trained, held_out = split_held_out(conversations, fraction=fraction)
    assert (len(trained), len(held_out)) == (3 - num_held_out, num_held_out)


def test_the_developers_instruction_data_is_read_whole(shared_data: Path) -> None:
    conversations, ledger = read_conversations(str(shared_data / "instruct" / "alpaca.jsonl.gz"))
    assert ledger == Ledger(num_rows=18_001)
    assert conversations[1].messages[0].content == (
        "Read this block of text and identify all verbs:\n"
        "They spoke of the pending threat with a sense of urgency."
    )
