"""Held-out endings: which of four endings goes on as the run's own validation documents do.

A window is a stretch of one document, a context and its ending; the three other endings are those
of windows of other documents. All endings have the same number of tokens. A small model that
learns its corpus shows it here long before it shows on the public benchmarks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from milepost.core.errors import DataError, UsageError
from milepost.core.files import sha256_of_json
from milepost.core.seeds import derive_seed
from milepost.data.shards import Document, ShardSet
from milepost.evaluation.items import Choice, Item, ItemSet
from milepost.text.tokenizer import Tokenizer

BENCHMARK = "heldout"
VERSION = 1
"""Changes whenever the same documents could give other items."""

NUM_CHOICES = 4
ENDING_TOKENS = 8
CONTEXT_TOKENS = 64
"""Before the ending, where the model's context has room for them.

Between steps 40 and 280 of a run of corpus-30m, endings of 8, 16 and 32 tokens moved acc_norm
from 24, 23 and 28 % to 38, 36 and 34 % (300 to 400 items): how rare the words of a long ending are
outweighs what the context says of them.
"""

FEWEST_CONTEXT_TOKENS = 16

MAX_WINDOWS_PER_DOCUMENT = 16
"""So that a few novels do not make up the whole set."""

MAX_WINDOWS = 10_000
"""As many items as HellaSwag has; the standard error is then below half a percent."""

_MAX_DRAWS = 64


@dataclass(frozen=True)
class Window:
    """A stretch of one document.

    Attributes:
        document: its number in the validation set, from 0.
        place: its number in the document, from 0.
        start: its first token, counted over all shards.
        context_ids: tokens before the ending, without the end-of-text token before them.
        ending_ids: the true continuation.
    """

    document: int
    place: int
    start: int
    context_ids: tuple[int, ...]
    ending_ids: tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """All windows of a validation set.

    Attributes:
        windows: the first of every document, then the second of every document, and so on.
        num_documents: that were looked at.
        num_short_documents: of them, too short for one window.
    """

    windows: tuple[Window, ...]
    num_documents: int
    num_short_documents: int


def open_heldout(
    validation: ShardSet,
    *,
    tokenizer: Tokenizer,
    context_length: int,
    limit: int | None,
    seed: int = 0,
) -> ItemSet:
    """The items of a run's validation documents.

    The first so many items are the same whatever the limit.

    Args:
        validation: the prepared validation shards; every byte is checked against its hash.
        tokenizer: of the shards.
        context_length: of the model, tokens.
        limit: take only the first so many items; None: all.
        seed: of the choice of the other endings and of the true one's place.

    Raises:
        UsageError: the model's context is too short.
        DataError: a shard is damaged, or there are too few documents.
    """
    num_context = context_tokens(context_length)
    for _ in validation.verify():
        pass
    found = windows_of(validation, num_context=num_context)
    items = _items(found.windows, tokenizer=tokenizer, seed=seed, limit=limit)
    if not items:
        raise _too_few(validation, found, num_tokens=num_context + ENDING_TOKENS)
    settings = {
        "version": VERSION,
        "validation": validation.fingerprint,
        "context_tokens": num_context,
        "ending_tokens": ENDING_TOKENS,
        "seed": seed,
    }
    return ItemSet(
        benchmark=BENCHMARK,
        protocol=f"heldout-{VERSION}, context {num_context}, ending {ENDING_TOKENS}, seed {seed}",
        num_fewshot=0,
        limit=limit,
        data_sha256=sha256_of_json(settings),
        metrics=("acc", "acc_norm"),
        items=items,
        num_truncated=0,
    )


def context_tokens(context_length: int) -> int:
    """Tokens before an ending, the end-of-text token not counted: 64, or what fits.

    Raises:
        UsageError: the model's context is too short.
    """
    # The last token of an ending is not read, so the end-of-text token has its place.
    fitting = min(CONTEXT_TOKENS, context_length - ENDING_TOKENS)
    if fitting < FEWEST_CONTEXT_TOKENS:
        raise UsageError(
            f"{BENCHMARK} needs a context of at least {FEWEST_CONTEXT_TOKENS + ENDING_TOKENS}"
            f" tokens, the model has {context_length}",
            hint="leave it out of the tasks",
        )
    return fitting


def windows_of(validation: ShardSet, *, num_context: int) -> Windows:
    """The windows of the first documents, until there are enough.

    Windows of one document do not overlap; where it holds more than may be taken, those that are
    taken lie evenly spread.

    Raises:
        DataError: the shards are missing or damaged.
    """
    size = num_context + ENDING_TOKENS
    windows: list[Window] = []
    num_documents = num_short = 0
    for document in validation.documents_between(0, validation.num_tokens):
        starts = _window_starts(document, size=size)
        for place, start in enumerate(starts):
            ids = tuple(validation.read(start, size).tolist())
            parts = (ids[:num_context], ids[num_context:])
            windows.append(Window(num_documents, place, start, *parts))
        num_documents += 1
        num_short += not starts
        if len(windows) >= MAX_WINDOWS:
            break
    windows.sort(key=lambda window: (window.place, window.document))
    return Windows(tuple(windows[:MAX_WINDOWS]), num_documents, num_short)


def _window_starts(document: Document, *, size: int) -> list[int]:
    first = document.start + 1  # its end-of-text token is put before every window
    num_fitting = (document.end - first) // size
    num_taken = min(num_fitting, MAX_WINDOWS_PER_DOCUMENT)
    return [first + size * (number * num_fitting // num_taken) for number in range(num_taken)]


def _items(
    windows: Sequence[Window], *, tokenizer: Tokenizer, seed: int, limit: int | None
) -> tuple[Item, ...]:
    items: list[Item] = []
    for window in windows:
        if limit is not None and len(items) == limit:
            break
        others = _other_endings(window, windows, seed=seed)
        if len(others) == NUM_CHOICES - 1:
            items.append(_item(window, others, tokenizer=tokenizer, seed=seed))
    return tuple(items)


def _item(
    window: Window, others: list[tuple[int, ...]], *, tokenizer: Tokenizer, seed: int
) -> Item:
    gold = derive_seed(seed, BENCHMARK, "place", window.start) % NUM_CHOICES
    endings = [*others[:gold], window.ending_ids, *others[gold:]]
    context_ids = (tokenizer.end_of_text_id, *window.context_ids)
    choices = tuple(
        Choice(context_ids, ending, num_characters=max(1, len(tokenizer.decode(ending))))
        for ending in endings
    )
    return Item(item_id=f"{window.document}:{window.start}", gold=gold, choices=choices)


def _other_endings(
    window: Window, windows: Sequence[Window], *, seed: int
) -> list[tuple[int, ...]]:
    """Endings of windows of other documents, no two equal; fewer than wanted if there are none."""
    chosen: list[tuple[int, ...]] = []
    taken = {window.ending_ids}
    # Random places first; where most windows are of the same document, then all in turn.
    drawn = (
        derive_seed(seed, BENCHMARK, "ending", window.start, number) % len(windows)
        for number in range(_MAX_DRAWS)
    )
    for place in itertools.chain(drawn, range(len(windows))):
        other = windows[place]
        if other.document != window.document and other.ending_ids not in taken:
            taken.add(other.ending_ids)
            chosen.append(other.ending_ids)
            if len(chosen) == NUM_CHOICES - 1:
                break
    return chosen


def _too_few(validation: ShardSet, found: Windows, *, num_tokens: int) -> DataError:
    with_window = found.num_documents - found.num_short_documents
    return DataError(
        f"{validation.folder}: {BENCHMARK} needs {NUM_CHOICES - 1} different endings from other"
        f" documents; of {found.num_documents} validation documents {with_window} hold the"
        f" {num_tokens} tokens of a window, {len(found.windows)} windows in all",
        hint="prepare the data with more validation documents, or leave heldout out of the tasks",
    )
