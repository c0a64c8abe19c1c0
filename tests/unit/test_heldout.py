"""Held-out endings: what the items are made of, and that the same documents give the same ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from milepost.core.errors import DataError, UsageError
from milepost.data.prepare import prepare
from milepost.data.shards import PreparedData, ShardSet, open_prepared
from milepost.evaluation import heldout
from milepost.evaluation.heldout import (
    CONTEXT_TOKENS,
    ENDING_TOKENS,
    context_tokens,
    open_heldout,
    windows_of,
)
from milepost.evaluation.items import ItemSet
from tests.conftest import made_up_text


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> PreparedData:
    return open_prepared(tiny_data)


@pytest.fixture(scope="module")
def validation(data: PreparedData) -> ShardSet:
    assert data.validation is not None
    return data.validation


def opened(data: PreparedData, *, limit: int | None = None, seed: int = 0, length: int = 512):
    assert data.validation is not None
    tokenizer = data.tokenizer()
    return open_heldout(
        data.validation, tokenizer=tokenizer, context_length=length, limit=limit, seed=seed
    )


def documents_with(validation: ShardSet, ending: tuple[int, ...]) -> set[int]:
    """Numbers of the documents that hold these tokens."""
    found = set()
    for number, document in enumerate(validation.documents_between(0, validation.num_tokens)):
        ids = validation.read(document.start, document.end - document.start).tolist()
        stretches = (tuple(ids[place : place + len(ending)]) for place in range(len(ids)))
        if ending in stretches:
            found.add(number)
    return found


def test_the_true_ending_goes_on_its_document_and_the_others_do_not(
    data: PreparedData, validation: ShardSet
) -> None:
    items = opened(data).items
    assert len(items) > 20
    for item in items:
        document, start = map(int, item.item_id.split(":"))
        true = item.choices[item.gold]
        text = validation.read(start, CONTEXT_TOKENS + ENDING_TOKENS).tolist()
        assert true.context_ids == (data.end_of_text_id, *text[:CONTEXT_TOKENS])
        assert true.target_ids == tuple(text[CONTEXT_TOKENS:])
        assert document in documents_with(validation, true.target_ids)
        for place, choice in enumerate(item.choices):
            assert choice.context_ids == true.context_ids
            assert len(choice.target_ids) == ENDING_TOKENS
            assert choice.num_characters == len(data.tokenizer().decode(choice.target_ids))
            if place != item.gold:
                assert documents_with(validation, choice.target_ids) - {document}
        assert len({choice.target_ids for choice in item.choices}) == 4


def test_windows_of_a_document_do_not_overlap_and_hold_no_end_of_text(
    data: PreparedData, validation: ShardSet
) -> None:
    found = windows_of(validation, num_context=20)
    assert (found.num_documents, found.num_short_documents) == (4, 0)
    ends: dict[int, int] = {}
    for window in sorted(found.windows, key=lambda window: window.start):
        assert window.start >= ends.get(window.document, 0)
        ends[window.document] = window.start + 20 + ENDING_TOKENS
        assert data.end_of_text_id not in window.context_ids + window.ending_ids
    assert max(window.place for window in found.windows) == heldout.MAX_WINDOWS_PER_DOCUMENT - 1


def test_a_limit_takes_the_first_items_and_every_document_comes_early(data: PreparedData) -> None:
    whole, part = opened(data), opened(data, limit=5)
    assert part.items == whole.items[:5]
    assert (part.limit, part.data_sha256) == (5, whole.data_sha256)
    assert {item.item_id.split(":")[0] for item in part.items} == {"0", "1", "2", "3"}


def test_the_seed_decides_places_and_other_endings(data: PreparedData) -> None:
    first, again, other = opened(data), opened(data), opened(data, seed=1)
    assert first == again
    assert other.protocol != first.protocol and other.data_sha256 != first.data_sha256
    assert [item.item_id for item in other.items] == [item.item_id for item in first.items]
    assert [item.gold for item in other.items] != [item.gold for item in first.items]
    places = [item.gold for item in first.items]
    assert set(places) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("context_length", "expected"), [(24, 16), (25, 17), (71, 63), (72, 64), (512, 64)]
)
def test_items_fit_the_context_of_the_model(
    data: PreparedData, context_length: int, expected: int
) -> None:
    assert context_tokens(context_length) == expected
    item_set = opened(data, length=context_length, limit=2)
    assert f"context {expected}," in item_set.protocol
    for item in item_set.items:
        for choice in item.choices:
            assert len(choice.context_ids + choice.target_ids) - 1 == expected + ENDING_TOKENS


def test_a_context_that_is_too_short_is_refused(data: PreparedData) -> None:
    with pytest.raises(UsageError, match="at least 24 tokens, the model has 23"):
        opened(data, length=23)


def prepared(folder: Path, texts: list[str]) -> PreparedData:
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train = folder / "train.txt"
    train.write_text(made_up_text(seed=9, num_words=2000))
    prepare(
        [train],
        out=folder / "data",
        tokenizer="train:300",
        val_sources=[folder / "validation.jsonl"],
        workers=1,
    )
    return open_prepared(folder / "data")


LONG = [made_up_text(seed=seed, num_words=300) for seed in range(3)]


@pytest.mark.parametrize(
    ("texts", "with_window"), [([LONG[0]], 1), (["a few words", "and some more"], 0)]
)
def test_too_few_documents_are_refused_with_their_number(
    tmp_path: Path, texts: list[str], with_window: int
) -> None:
    data = prepared(tmp_path, texts)
    with pytest.raises(DataError, match=f"of {len(texts)} validation documents {with_window} hold"):
        opened(data)


def test_equal_documents_never_offer_the_true_ending_twice(tmp_path: Path) -> None:
    items = opened(prepared(tmp_path, [LONG[0], LONG[0]])).items
    assert items
    for item in items:
        assert len({choice.target_ids for choice in item.choices}) == 4


def test_short_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    data = prepared(tmp_path, ["few words", *LONG, "", "fewer"])
    assert data.validation is not None
    found = windows_of(data.validation, num_context=CONTEXT_TOKENS)
    assert found.num_documents - found.num_short_documents == 3
    assert {item.item_id.split(":")[0] for item in opened(data).items} == {
        str(window.document) for window in found.windows
    }


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    data = prepared(tmp_path, LONG)
    [path] = (tmp_path / "data").glob("validation-*.tokens")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"has other bytes than its manifest says"):
        opened(data)


def test_the_set_says_what_it_is(data: PreparedData) -> None:
    item_set: ItemSet = opened(data)
    bare = replace(item_set, items=())
    assert bare == ItemSet(
        benchmark="heldout",
        protocol="heldout-1, context 64, ending 8, seed 0",
        num_fewshot=0,
        limit=None,
        data_sha256=item_set.data_sha256,
        metrics=("acc", "acc_norm"),
        items=(),
        num_truncated=0,
    )
