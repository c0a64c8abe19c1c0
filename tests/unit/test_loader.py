"""Shards and batches: what is read, in which order, and what a damaged shard says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.core.errors import DataError
from milepost.data import assemble, shards
from milepost.data.loader import Loader, batch_sha256, sequential_rows
from milepost.data.prepare import prepare
from milepost.data.shards import PreparedData, open_prepared
from tests.damage import flip, truncate

TEXTS = [f"Document {n} says {n * n} and " + "again " * (n % 7) for n in range(150)]


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """These tests lose no power; a hundred small folders would wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def make(folder: Path) -> PreparedData:
    source = folder / "texts.jsonl"
    lines = [json.dumps({"text": text, "id": f"doc-{n}"}) for n, text in enumerate(TEXTS)]
    source.write_text("\n".join(lines))
    prepare([source], out=folder / "out", tokenizer="gpt2", val_fraction=0.1)
    return open_prepared(folder / "out")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Data in several shards: one a block, blocks of a few documents."""
    from milepost.data import blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", 1000)
        patch.setattr(blocks, "READ_BYTES", 300)
        patch.setattr(assemble, "SHARD_TOKENS", 500)
        patch.setattr(shards, "MAX_OPEN_FILES", 2)
        return make(tmp_path_factory.mktemp("data"))


def all_tokens(data: PreparedData) -> np.ndarray:
    return data.train.read(0, data.train.num_tokens)


def test_the_shards_hold_each_document_behind_an_end_of_text_token(data: PreparedData) -> None:
    tokenizer = data.tokenizer()
    text = tokenizer.decode(all_tokens(data))
    documents = text.split("<|endoftext|>")
    assert documents[0] == ""
    assert set(documents[1:]) < set(TEXTS)
    assert data.validation is not None
    held_out = tokenizer.decode(data.validation.read(0, data.validation.num_tokens))
    assert set(held_out.split("<|endoftext|>")[1:]) == set(TEXTS) - set(documents)
    assert data.train.num_documents + data.validation.num_documents == len(TEXTS)
    assert data.train.num_bytes == sum(len(text) for text in documents)
    assert len(data.train.shards) > 2


@given(place=st.data())
@settings(max_examples=60, deadline=None)
def test_reading_over_shard_borders_gives_the_same_tokens(
    data: PreparedData, place: st.DataObject
) -> None:
    whole = all_tokens(data)
    start = place.draw(st.integers(0, len(whole)))
    count = place.draw(st.integers(0, len(whole) - start))
    part = data.train.read(start, count)
    assert part.dtype == np.uint32
    assert np.array_equal(part, whole[start : start + count])


def test_rows_overlap_by_one_token_and_come_in_the_keyed_order(data: PreparedData) -> None:
    whole = all_tokens(data)
    with Loader(data.train, seed=3, sequence_length=16, rows_per_step=5) as loader:
        assert loader.num_rows == (len(whole) - 1) // 16
        for step in range(loader.num_rows // 5 + 2):
            batch = loader.batch(step)
            assert batch.shape == (5, 17) and batch.dtype == np.uint32
            for row, row_id in zip(batch, loader.row_ids(step), strict=True):
                assert np.array_equal(row, whole[row_id * 16 : row_id * 16 + 17])


def test_a_batch_is_a_function_of_its_step(data: PreparedData) -> None:
    def loader(seed: int = 3) -> Loader:
        return Loader(data.train, seed=seed, sequence_length=8, rows_per_step=4)

    with loader() as straight, loader() as jumping, loader(4) as other:
        in_order = [straight.batch(step) for step in range(12)]
        for step in (7, 8, 9, 0, 3, 3, 2, 11):
            assert np.array_equal(jumping.batch(step), in_order[step])
        assert not np.array_equal(other.batch(0), in_order[0])


def test_the_batch_hash_is_over_little_endian_ids_in_row_order() -> None:
    batch = np.array([[1, 2], [3, 70000]], dtype=np.uint32)
    raw = b"".join(int(number).to_bytes(4, "little") for number in batch.ravel())
    assert batch_sha256(batch) == hashlib.sha256(raw).hexdigest()
    assert batch_sha256(batch.astype(np.int64)) == batch_sha256(batch)


def test_fewer_rows_than_a_batch_are_refused_with_numbers(data: PreparedData) -> None:
    num_rows = (data.train.num_tokens - 1) // 64
    Loader(data.train, seed=1, sequence_length=64, rows_per_step=num_rows).close()
    message = (
        f"{data.train.num_tokens} training tokens are {num_rows} rows of 64, "
        f"fewer than the {num_rows + 1} of one batch"
    )
    with pytest.raises(DataError, match=message):
        Loader(data.train, seed=1, sequence_length=64, rows_per_step=num_rows + 1)


@pytest.mark.parametrize("max_tokens", [1, 31, 32, 33, 10**9])
def test_validation_rows_cover_the_set_once_with_a_partial_last_row(
    data: PreparedData, max_tokens: int
) -> None:
    assert data.validation is not None
    whole = data.validation.read(0, data.validation.num_tokens).astype(np.int64)
    inputs, targets = sequential_rows(data.validation, sequence_length=32, max_tokens=max_tokens)
    num_targets = min(max_tokens, len(whole) - 1)
    assert inputs.shape == targets.shape == (-(-num_targets // 32), 32)
    assert inputs.dtype == targets.dtype == np.int64
    assert (targets >= 0).sum() == num_targets
    assert np.array_equal(targets.ravel()[:num_targets], whole[1 : num_targets + 1])
    assert np.array_equal(inputs.ravel()[:num_targets], whole[:num_targets])


def test_documents_are_found_by_their_tokens(data: PreparedData) -> None:
    tokenizer = data.tokenizer()
    documents = list(data.train.documents_between(0, data.train.num_tokens))
    assert len(documents) == data.train.num_documents
    assert documents[0].start == 0 and documents[-1].end == data.train.num_tokens
    for document in documents:
        number = int(document.name.removeprefix("doc-"))
        ids = data.train.read(document.start, document.end - document.start)
        assert tokenizer.decode(ids) == "<|endoftext|>" + TEXTS[number]
        assert document.line == number + 1 and document.source.endswith("texts.jsonl")
        assert document.num_bytes == len(TEXTS[number])
        assert data.train.document_at(document.start) == document
        assert data.train.document_at(document.end - 1) == document
    some = list(data.train.documents_between(documents[3].end - 1, documents[5].start + 1))
    assert some == documents[3:6]


@pytest.mark.parametrize("ending", ["tokens", "offsets", "documents.jsonl"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "bytes, its manifest says"),
        (flip, "has other bytes than its manifest says"),
        (Path.unlink, "is missing"),
    ],
    ids=["truncated", "flipped", "deleted"],
)
def test_a_damaged_shard_is_named(
    tmp_path: Path, ending: str, damage: Callable[[Path], None], message: str
) -> None:
    data = make(tmp_path)
    list(data.train.verify())
    damage(tmp_path / "out" / f"train-00000.{ending}")
    with pytest.raises(DataError, match=rf"train-00000\.{ending} .*{message}") as caught:
        list(data.train.verify())
    assert "prepare the data again" in str(caught.value.hint)


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    data = make(tmp_path)
    with Loader(data.train, seed=1, sequence_length=16, rows_per_step=2) as loader:
        loader.batch(0)
        path = tmp_path / "out" / "train-00000.tokens"
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(100)
        with pytest.raises(DataError, match=rf"train-00000.tokens ends at byte .*, not at {size}"):
            for step in range(1, 50):
                loader.batch(step)


def test_a_new_modification_time_alone_is_accepted(tmp_path: Path) -> None:
    data = make(tmp_path)
    (tmp_path / "out" / "train-00000.tokens").touch()
    list(data.train.verify())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no prepared data: it has no manifest.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "is not the manifest of prepared data"),
        ('{"format": "milepost-data", "v": 99}', "has schema version 99"),
        ('{"format": "milepost-data", "v": 1}', "is damaged"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_prepared(tmp_path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    values["splits"]["train"]["shards"][0]["tokens"]["sha256"] = "0" * 64
    del values["sha256"]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="the fingerprint does not match the shards"):
        open_prepared(tmp_path / "out")


def test_another_tokenizer_beside_the_shards_is_refused(tmp_path: Path) -> None:
    data = make(tmp_path)
    path = tmp_path / "out" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"version": "1.0"', '"version": "1.1"'))
    with pytest.raises(DataError):
        data.tokenizer()
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer.json is missing"):
        data.tokenizer()
