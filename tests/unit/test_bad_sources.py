"""Sources that are damaged, hostile or absent: named by file and line, or dropped and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from milepost.core.errors import DataError, MilepostError
from milepost.data import blocks, document
from milepost.data.prepare import prepare
from milepost.data.shards import open_prepared
from tests.sources import (
    TEXTS,
    lines_of,
    numbered,
    run,
    texts_of,
    write_gzip,
    write_jsonl,
    write_parquet,
    write_zstd,
)

pytestmark = pytest.mark.usefixtures("no_fsync")

BAD_LINES = {
    "not-utf8": (b'{"text": "caf\xe9"}', "not_utf8", "is not UTF-8: byte 0xe9 at byte 13"),
    "not-json": (b"{text: 1}", "not_json", "is not JSON: Expecting property name"),
    "torn": (b'{"text": "abc', "not_json", "is not JSON: Unterminated string"),
    "nan": (b'{"text": "a", "score": NaN}', "not_json", "NaN is not a JSON number"),
    "list": (b'["text"]', "not_an_object", "is JSON of type list, not an object"),
    "null": (b"null", "not_an_object", "is JSON of type NoneType, not an object"),
    "missing": (b'{"txt": "a"}', "text_missing", "has no text in field 'text'"),
    "null-text": (b'{"text": null}', "text_missing", "has no text in field 'text'"),
    "number": (b'{"text": 5}', "text_not_a_string", "field 'text' is of type int, not text"),
    "nested": (b"[" * 100_000, "not_json", "is nested too deep"),
    "nested-object": (b'{"text":' * 100_000, "not_json", "is nested too deep"),
    "huge-number": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not_json", "is not JSON"),
    "surrogate": (b'{"text": "ab\\ud800"}', "lone_surrogate", "lone surrogate) at character 2"),
    "nul": (b'{"text": "a\\u0000b"}', "nul_character", "holds a NUL character at character 1"),
    "raw-nul": (b'{"text": "a\x00b"}', "not_json", "is not JSON: Invalid control character"),
    "twice": (b'{"text": "a", "text": "b"}', "duplicate_key", "field 'text' stands twice"),
}


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_or_dropped_and_counted(
    tmp_path: Path, line: bytes, reason: str, message: str
) -> None:
    source = tmp_path / "bad.jsonl"
    good = lines_of(TEXTS)
    source.write_bytes(good + line + b"\n" + good + line + b"\n")
    with pytest.raises(DataError) as caught:
        run(source, tmp_path / "out")
    assert caught.value.message.startswith(f"{source}:4: ")
    assert message in caught.value.message
    assert "--skip-bad" in str(caught.value.hint)
    with pytest.raises(DataError, match="holds no prepared data"):
        open_prepared(tmp_path / "out")
    summary = run(source, tmp_path / "out", skip_bad=True)
    assert summary.dropped == {reason: 2}
    assert texts_of(tmp_path / "out") == TEXTS + TEXTS
    listed = [json.loads(x) for x in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(d["file"], d["line"], d["reason"]) for d in listed] == [
        (str(source), 4, reason),
        (str(source), 8, reason),
    ]


def test_the_word_text_elsewhere_in_an_object_is_not_twice(tmp_path: Path) -> None:
    line = {"text": 'has "text" in it', "meta": {"text": "x"}, "list": [{"text": 1}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    run(tmp_path / "a.jsonl", tmp_path / "out")
    assert texts_of(tmp_path / "out") == ['has "text" in it']


@pytest.mark.parametrize("size", [39, 40, 41, 500])
def test_a_line_above_the_limit_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The limit is lowered to 40 bytes, read 16 at a time."""
    for module in (document, blocks):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 40)
    monkeypatch.setattr(blocks, "READ_BYTES", 16)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    source = tmp_path / "long.jsonl"
    long_line = b'{"text": "' + b"x" * (size - 12) + b'"}'
    good = b'{"text": "good"}\n'
    for content in (good * 3 + long_line + b"\n" + good, good * 3 + long_line):
        source.write_bytes(content)
        out = tmp_path / f"out{len(content)}"
        is_too_long = size > 40
        if is_too_long:
            with pytest.raises(DataError, match=r"long.jsonl:4: is longer than"):
                run(source, out)
        summary = run(source, out, skip_bad=True)
        assert summary.dropped == ({"too_long": 1} if is_too_long else {})
        assert texts_of(out).count("good") == content.count(b"good")
        assert open_prepared(out).train.document_at(0).line == 1


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("texts.jsonl.gz", write_gzip),
        ("texts.jsonl.zst", write_zstd),
        ("texts.parquet", write_parquet),
    ],
)
@pytest.mark.parametrize("damage", [cut_short, spoil])
def test_a_damaged_file_is_named_or_left_where_the_damage_begins(
    tmp_path: Path, name: str, write: Callable[[Path], None], damage: Callable[[Path], None]
) -> None:
    write_jsonl(tmp_path / "good.jsonl")
    source = tmp_path / name
    write(source)
    damage(source)
    with pytest.raises(DataError, match=rf"{name}:\d+: cannot be read"):
        run(source, tmp_path / "out")
    summary = prepare(
        [tmp_path / "good.jsonl", source], out=tmp_path / "out", tokenizer="gpt2", skip_bad=True
    )
    assert summary.dropped["damaged_file"] == 1
    assert texts_of(tmp_path / "out")[:3] == TEXTS


def test_a_table_without_the_text_column_is_refused_with_its_columns(tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b"], "id": [1, 2]}), source)
    with pytest.raises(
        DataError, match=r"has no column 'text'; its columns are body, id"
    ) as caught:
        run(source, tmp_path / "out")
    assert "--text-field" in str(caught.value.hint)
    run(source, tmp_path / "out", text_field="body")
    assert [d.name for d in open_prepared(tmp_path / "out").train.documents_between(0, 4)] == [
        "1",
        "2",
    ]


def test_bad_rows_of_a_table_are_counted_with_their_numbers(tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    raw = pyarrow.array([b"good", b"caf\xe9", b"fine"], pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), source)
    with pytest.raises(DataError, match=r"a.parquet:2: is not UTF-8: byte 0xe9 at byte 3"):
        run(source, tmp_path / "out")
    summary = run(source, tmp_path / "out", skip_bad=True)
    assert summary.dropped == {"not_utf8": 1}
    assert texts_of(tmp_path / "out") == ["good", "fine"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no source"),
        ("a.csv", b"x", "is of a kind that is not read"),
        ("empty.jsonl", b"", "empty.jsonl:1: is empty"),
        ("empty.txt", b"", "the sources hold no training document"),
        ("blank.jsonl", b"\n\n", "the sources hold no training document"),
    ],
)
def test_a_missing_or_empty_source_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / name, tmp_path / "out")
    with pytest.raises(DataError, match="holds no prepared data"):
        open_prepared(tmp_path / "out")


def test_a_folder_without_a_known_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("x")
    with pytest.raises(DataError, match="holds no file that is read") as caught:
        run(tmp_path / "texts", tmp_path / "out")
    assert ".jsonl.zst" in str(caught.value.hint)


def test_a_source_given_twice_is_refused(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl is given twice"):
        prepare([source, tmp_path], out=tmp_path / "out", tokenizer="gpt2")


def test_a_worker_says_what_is_wrong_as_if_there_were_none(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines_of(TEXTS) + b"oops\n")
    with pytest.raises(MilepostError) as caught:
        run(source, tmp_path / "out", workers=2)
    assert caught.value.exit_code == 3
    assert caught.value.message.startswith(f"{source}:4: is not JSON")
    assert "--skip-bad" in str(caught.value.hint)
