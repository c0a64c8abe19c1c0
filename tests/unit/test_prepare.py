"""Preparing data: every kind of source, bad input, and what a second call does."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from milepost.core.errors import DataError, MilepostError, RunInUseError, UsageError
from milepost.core.files import exclusive_lock
from milepost.data import blocks, document
from milepost.data.prepare import PrepareSummary, prepare
from milepost.data.shards import PreparedData, open_prepared

TEXTS = ["First text.", "Second text, with “quotes”.\r\nAnd lines.", "Third <|endoftext|> text"]


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """These tests lose no power; a hundred small folders would wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def run(source: Path, out: Path, **options: Any) -> PrepareSummary:
    return prepare([source], out=out, **({"tokenizer": "gpt2"} | options))


def texts_of(out: Path) -> list[str]:
    """The texts, cut at the control token and not where a text only looks like it."""
    data = open_prepared(out)
    tokenizer = data.tokenizer()
    documents = data.train.documents_between(0, data.train.num_tokens)
    ids = [data.train.read(d.start, d.end - d.start).tolist() for d in documents]
    assert all(i[0] == data.end_of_text_id and data.end_of_text_id not in i[1:] for i in ids)
    return [tokenizer.decode(i[1:]) for i in ids]


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != ".lock"}


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_jsonl(path: Path) -> None:
    path.write_bytes(lines_of(TEXTS))


def write_gzip(path: Path) -> None:
    members = [gzip.compress(lines_of(TEXTS[:1])), gzip.compress(lines_of(TEXTS[1:]))]
    path.write_bytes(b"".join(members))


def write_zstd(path: Path) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(lines_of(TEXTS[:2]))
    first = path.read_bytes()
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(lines_of(TEXTS[2:]))
    path.write_bytes(first + path.read_bytes())


def write_parquet(path: Path) -> None:
    """The columns of FineWeb-Edu."""
    table = pyarrow.table(
        {
            "text": TEXTS,
            "id": ["<urn:uuid:1>", "<urn:uuid:2>", "<urn:uuid:3>"],
            "dump": ["CC-MAIN-2024-10"] * 3,
            "url": ["http://example.org"] * 3,
            "score": [3.1, 2.9, 4.0],
            "token_count": [3, 9, 10],
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("texts.jsonl", write_jsonl),
        ("texts.jsonl.gz", write_gzip),
        ("texts.jsonl.zst", write_zstd),
        ("texts.parquet", write_parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_shards(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    write_jsonl(tmp_path / "plain.jsonl")
    summary = run(tmp_path / name, tmp_path / "out")
    plain = run(tmp_path / "plain.jsonl", tmp_path / "plain")
    assert texts_of(tmp_path / "out") == TEXTS
    assert summary.train == plain.train
    assert summary.train["num_documents"] == 3
    assert summary.train["num_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert summary.validation is None and summary.dropped == {}
    document = open_prepared(tmp_path / "out").train.document_at(0)
    assert document.name == ("<urn:uuid:1>" if "parquet" in name else f"{tmp_path / name}:1")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, text in {"c.txt": "three", "a.txt": "one", "b/x.txt": "two", "read.me": "no"}.items():
        (folder / name).write_text(text)
    (folder / ".hidden" / "d.txt").write_text("no")
    run(folder, tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["one", "two", "three"]


def test_byte_order_marks_line_ends_and_blank_lines_are_no_part_of_the_text(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two"}\r\n\n{"text": "three"}'
    )
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbffour\r\nfive\n")
    prepare([tmp_path / "a.jsonl", tmp_path / "b.txt"], out=tmp_path / "out", tokenizer="gpt2")
    assert texts_of(tmp_path / "out") == ["one", "two", "three", "four\r\nfive\n"]
    lines = [d.line for d in open_prepared(tmp_path / "out").train.documents_between(0, 9)]
    assert lines == [1, 4, 6, 1]


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


def test_empty_texts_are_dropped_and_counted_without_being_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["", "one", ""]))
    (tmp_path / "b.txt").write_text("")
    summary = prepare(
        [tmp_path / "a.jsonl", tmp_path / "b.txt"], out=tmp_path / "out", tokenizer="gpt2"
    )
    assert summary.dropped == {"empty_text": 3}
    assert texts_of(tmp_path / "out") == ["one"]


def test_another_text_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "one", "text": 3}')
    run(tmp_path / "a.jsonl", tmp_path / "out", text_field="content")
    assert texts_of(tmp_path / "out") == ["one"]


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


@pytest.mark.parametrize("block_bytes", [1, 30, 64, 10**6])
@pytest.mark.parametrize("read_bytes", [1, 7, 64, 10**6])
def test_where_blocks_are_cut_changes_no_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, read_bytes: int
) -> None:
    monkeypatch.setattr(blocks, "READ_BYTES", read_bytes)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n" + lines_of(TEXTS) + b"\n\n" + lines_of(TEXTS).rstrip())
    from milepost.data.sources import find_files

    unit = blocks.make_units(list(enumerate(find_files([source]))), split="train")[0]
    found = [
        (item.line, item.text)
        for block in blocks.read_blocks(unit, paths={0: source})
        for _, item in blocks.documents_of(block, text_field="text")
        if isinstance(item, document.RawDocument)
    ]
    assert found == list(zip([2, 3, 4, 7, 8, 9], TEXTS + TEXTS, strict=True))


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


def numbered(path: Path, *, count: int = 60) -> Path:
    path.write_bytes(lines_of([f"text number {number}" for number in range(count)]))
    return path


def test_the_validation_fraction_depends_on_the_texts_alone(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl")
    run(source, tmp_path / "one", val_fraction=0.2)
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join(reversed(lines)) + lines[0])
    run(source, tmp_path / "two", val_fraction=0.2)

    def held_out(out: Path) -> set[str]:
        data = open_prepared(out)
        assert data.validation is not None
        ids = data.validation.read(0, data.validation.num_tokens)
        return set(data.tokenizer().decode(ids).split("<|endoftext|>")[1:])

    assert held_out(tmp_path / "one") == held_out(tmp_path / "two")
    assert 4 <= len(held_out(tmp_path / "one")) <= 22
    assert not held_out(tmp_path / "one") & set(texts_of(tmp_path / "one"))


def test_validation_sources_are_held_out_also_from_a_folder_that_holds_them(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"text {number}")
    run(folder, tmp_path / "out", val_sources=[folder / "1.txt", folder / "3.txt"])
    assert texts_of(tmp_path / "out") == ["text 0", "text 2", "text 4"]
    data = open_prepared(tmp_path / "out")
    assert data.validation is not None
    assert data.validation.fingerprint != data.train.fingerprint
    ids = data.validation.read(0, data.validation.num_tokens)
    assert data.tokenizer().decode(ids) == "<|endoftext|>text 1<|endoftext|>text 3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "a validation fraction of 0.0 is out of range"),
        ({"val_fraction": float("nan")}, "a validation fraction of nan is out of range"),
        ({"val_fraction": 0.5, "val_sources": ["b"]}, "both --val and --val-fraction"),
        ({"workers": 0}, "0 workers are out of range"),
        ({"tokenizer": "train:many"}, "'train:many' does not say how large"),
        ({"tokenizer": "train:12"}, "a vocabulary of 12 cannot be trained"),
        ({"tokenizer": "gpt3"}, "there is no tokenizer 'gpt3'"),
    ],
)
def test_options_out_of_range_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    source = numbered(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=message):
        run(source, tmp_path / "out", **options)


def test_a_fraction_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no document fell into the validation set"):
        run(source, tmp_path / "out", val_fraction=1e-9)


def test_a_source_given_twice_is_refused(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl is given twice"):
        prepare([source, tmp_path], out=tmp_path / "out", tokenizer="gpt2")


def test_a_tokenizer_is_trained_on_the_training_text_alone(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat and the cat sat there " * 20)
    (folder / "b.txt").write_text("zzzz qqqq " * 500)
    run(folder, tmp_path / "out", tokenizer="train:262", val_sources=[folder / "b.txt"])
    data = open_prepared(tmp_path / "out")
    tokens = json.loads(data.tokenizer().files()["tokenizer.json"])["model"]["vocab"]
    assert data.vocab_size == 262 and "zz" not in tokens
    assert data.manifest["tokenizer"]["name"] == "train:262"


def test_a_second_call_says_that_it_is_done_or_is_refused(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl")
    first = run(source, tmp_path / "out")
    before = content_of(tmp_path / "out")
    again = run(source, tmp_path / "out")
    assert (first.was_done, again.was_done) == (False, True)
    assert again.train == first.train
    with pytest.raises(
        UsageError, match=r"prepared otherwise \(differs in: text_field\)"
    ) as caught:
        run(source, tmp_path / "out", text_field="other")
    assert "choose another folder" in str(caught.value.hint)
    assert content_of(tmp_path / "out") == before
    source.write_bytes(source.read_bytes())
    with pytest.raises(UsageError, match=r"a.jsonl was changed after"):
        run(source, tmp_path / "out")
    source.write_bytes(source.read_bytes() + b"\n")
    with pytest.raises(UsageError, match=r"differs in: sources"):
        run(source, tmp_path / "out")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="holds other files, and no prepared data"):
        run(source, tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        run(source, source)


def test_two_preparations_of_one_folder_are_refused(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl")
    with exclusive_lock(tmp_path / "out" / ".lock", what="it"):
        with pytest.raises(RunInUseError, match="out is in use by process"):
            run(source, tmp_path / "out")


def test_work_of_other_settings_is_not_taken_up(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no text in field 'body'"):
        run(source, tmp_path / "out", text_field="body")
    (tmp_path / "out" / "train-00000.tokens").write_bytes(b"left over")
    assert run(source, tmp_path / "out").train["num_documents"] == 60
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        ".lock",
        "manifest.json",
        "tokenizer",
        "train-00000.tokens",
        "train-00000.offsets",
        "train-00000.documents.jsonl",
    }


def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 600)
    monkeypatch.setattr(blocks, "READ_BYTES", 200)
    (tmp_path / "texts").mkdir()
    numbered(tmp_path / "texts" / "a.jsonl")
    (tmp_path / "texts" / "b.txt").write_text("a plain text")
    write_parquet(tmp_path / "texts" / "c.parquet")
    for workers in (1, 3):
        run(tmp_path / "texts", tmp_path / f"out{workers}", val_fraction=0.1, workers=workers)
    assert content_of(tmp_path / "out1") == content_of(tmp_path / "out3")


def test_a_worker_says_what_is_wrong_as_if_there_were_none(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(lines_of(TEXTS) + b"oops\n")
    with pytest.raises(MilepostError) as caught:
        run(source, tmp_path / "out", workers=2)
    assert caught.value.exit_code == 3
    assert caught.value.message.startswith(f"{source}:4: is not JSON")
    assert "--skip-bad" in str(caught.value.hint)


def test_ids_above_two_bytes_take_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary above 65,536, made of words."""
    vocab = {f"w{n}": n for n in range(70_000)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab | {"<unk>": 70_000}, "unk_token": "<unk>"},
    }
    entry = {"id": 70_001, "content": "</s>", "special": True, "single_word": False}
    tokenizer["added_tokens"] = [entry | {"lstrip": False, "rstrip": False, "normalized": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "a.txt").write_text("w1 w65535 w65536 w69999 </s>")
    run(tmp_path / "a.txt", tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    data: PreparedData = open_prepared(tmp_path / "out")
    assert data.manifest["dtype"] == "uint32"
    assert data.train.read(0, 6).tolist() == [70_001, 1, 65_535, 65_536, 69_999, 70_000]
