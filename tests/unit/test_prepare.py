"""Preparing data: every kind of source, what is held out, and what a second call does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.core.errors import DataError, RunInUseError, UsageError
from milepost.core.files import exclusive_lock
from milepost.data import blocks, document
from milepost.data.prepare import prepare
from milepost.data.shards import PreparedData, open_prepared
from tests.sources import (
    TEXTS,
    content_of,
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
