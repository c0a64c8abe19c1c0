"""Tokenized items on disk, so that a benchmark is tokenized once: plain numbers with their hash.

A cache that cannot be written or is damaged is done without; nothing here ever raises for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.errors import StorageError
from milepost.core.files import write_atomically
from milepost.evaluation.items import Choice, Item, ItemSet

_DIGEST_BYTES = hashlib.sha256().digest_size


def user_cache_folder() -> Path:
    """Where this user's caches of Milepost lie: below $XDG_CACHE_HOME, by default ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a user without a home: nothing can be written there
        folder = Path(os.devnull)
    return folder / "milepost"


def load_items(path: Path, *, key: str) -> ItemSet | None:
    """The items of an earlier call, None where there are none that are whole and of this key."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    payload = data[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != data[:_DIGEST_BYTES]:
        return None
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        if about.pop("key") != key:  # a file under another's name
            return None
        items = _items(about.pop("ids"), {name: arrays[name].tolist() for name in _ARRAYS})
    return ItemSet(**about | {"metrics": tuple(about["metrics"]), "items": items})


def save_items(path: Path, items: ItemSet, *, key: str) -> None:
    """Writes items for later calls, atomically, or not at all where the disk does not let it."""
    ids = [item.item_id for item in items.items]
    about = asdict(replace(items, items=())) | {"key": key, "ids": ids}
    arrays: dict[str, Any] = _arrays(items.items)
    stream = io.BytesIO()
    np.savez(stream, about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8), **arrays)
    payload = stream.getvalue()
    with contextlib.suppress(StorageError):
        write_atomically(path, hashlib.sha256(payload).digest() + payload)


_ARRAYS = (
    "gold",  # of each item
    "num_choices",
    "context_of",  # of each choice: the number of its context, which choices share
    "num_characters",
    "context_ids",  # of all contexts, one after the other
    "context_lengths",
    "target_ids",
    "target_lengths",
)


def _arrays(items: Sequence[Item]) -> dict[str, np.ndarray]:
    choices = [choice for item in items for choice in item.choices]
    contexts = {context: number for number, context in enumerate(_distinct(choices))}
    lists: dict[str, Iterator[int]] = {
        "gold": (item.gold for item in items),
        "num_choices": (len(item.choices) for item in items),
        "context_of": (contexts[choice.context_ids] for choice in choices),
        "num_characters": (choice.num_characters for choice in choices),
        "context_ids": (token for context in contexts for token in context),
        "context_lengths": (len(context) for context in contexts),
        "target_ids": (token for choice in choices for token in choice.target_ids),
        "target_lengths": (len(choice.target_ids) for choice in choices),
    }
    return {name: np.fromiter(lists[name], dtype=np.int32) for name in _ARRAYS}


def _distinct(choices: Sequence[Choice]) -> list[tuple[int, ...]]:
    """Every context once, in the order they come."""
    return list(dict.fromkeys(choice.context_ids for choice in choices))


def _items(ids: list[str], lists: dict[str, list[int]]) -> tuple[Item, ...]:
    contexts = list(_cut(lists["context_ids"], lists["context_lengths"]))
    choices = [
        Choice(contexts[context], target, num_characters)
        for context, target, num_characters in zip(
            lists["context_of"],
            _cut(lists["target_ids"], lists["target_lengths"]),
            lists["num_characters"],
            strict=True,
        )
    ]
    items, start = [], 0
    for item_id, gold, count in zip(ids, lists["gold"], lists["num_choices"], strict=True):
        items.append(Item(item_id, gold, tuple(choices[start : start + count])))
        start += count
    return tuple(items)


def _cut(ids: list[int], lengths: list[int]) -> Iterator[tuple[int, ...]]:
    start = 0
    for length in lengths:
        yield tuple(ids[start : start + length])
        start += length
