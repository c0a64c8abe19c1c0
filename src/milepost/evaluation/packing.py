"""Token sequences that share beginnings, packed into rows so that each token is computed once.

A row is a tree of tokens laid out in depth-first order: a token stands at the position it has
in its sequence and sees the tokens on the way to it, no others. What shares a row, a batch and
a part depends on the sequences alone, not on ranks.

Not tried: computing the shared beginning first and repeating its keys and values for each ending.
The products would be the same; only pairs of tokens in attention would be saved, and attention
was a seventh of a block's time on the CPU in float32 (205 tokens, D = 384).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Of a batch, by the kind of device; on the CPU what a core's share of the cache holds."""

ROW_TOKENS = 1024
"""Of a row that several sequences share; see `plan_rows`."""

PART_PLACES = 256
"""Places where answers are read, beyond which a part is full: with so many the head's product
no longer takes its time from reading the weights (7 rows: 3.3 ms, 52: 10, 256: 42, 1024: 168)."""

MOST_PARTS = 32
"""A part may hold several batches where there are more batches than this, so that there is
something to deal."""

PAIRS_PER_TOKEN = 1024
"""Pairs of tokens whose attention costs as much as one token in everything else; narrow models
are near it, wide ones far above, where a row may be longer. Fixed, as rows are part of the last
bits."""


@dataclass(frozen=True)
class Segment:
    """One sequence in a row: what it adds to the tree.

    Attributes:
        sequence: its number.
        num_shared: tokens at its beginning that it has in common with the sequence before it.
        start: place in the row of its first token that is new.
        stop: place behind its last.
    """

    sequence: int
    num_shared: int
    start: int
    stop: int


Row = tuple[Segment, ...]


@dataclass(frozen=True)
class Pair:
    """A context and what may follow it, both as token ids, neither empty."""

    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What a model reads; the last token is only predicted."""
        return self.context_ids + self.target_ids[:-1]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    Attributes:
        input_ids_BT: int64, padded with 0.
        positions_BT: int64, where each token stands in its own sequence.
        mask: bool [B, 1, T, T]; padding sees itself.
        places_BQ: int64 in rising order, where targets are predicted; the last is repeated.
        read_K: int64, for each token of a target its place among all B x Q.
        target_K: int64, the token.
        pair_K: number of its pair, on the host.
    """

    input_ids_BT: Tensor
    positions_BT: Tensor
    mask: Tensor
    places_BQ: Tensor
    read_K: Tensor
    target_K: Tensor
    pair_K: np.ndarray


@dataclass(frozen=True)
class PackedRow:
    """A row as arrays.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, of each token in its sequence.
        sees: [T, T] bool, True where a token sees another or itself.
        paths: by sequence number, the places [length] of its tokens.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    sees: np.ndarray
    paths: dict[int, np.ndarray]


def plan_parts(
    sequences: Sequence[tuple[int, ...]], pairs: Sequence[Pair], *, device_type: str
) -> list[list[list[Row]]]:
    """What is dealt to ranks: parts of batches of rows; the head is applied once a part."""
    rows = plan_rows(sequences, max_tokens=ROW_TOKENS)
    batches = plan_batches(rows, max_tokens=BATCH_TOKENS[device_type])
    most_batches = max(1, len(batches) // MOST_PARTS)
    parts: list[list[list[Row]]] = []
    num_places = 0
    for batch in batches:
        if not parts or num_places >= PART_PLACES or len(parts[-1]) == most_batches:
            parts.append([])
            num_places = 0
        parts[-1].append(batch)
        num_places += sum(len(pairs[s.sequence].target_ids) for row in batch for s in row)
    return parts


def plan_rows(sequences: Sequence[tuple[int, ...]], *, max_tokens: int) -> list[Row]:
    """Which sequences share a row: neighbors in alphabetical order, while that saves work.

    Args:
        sequences: token ids; equal ones share all their tokens.
        max_tokens: of a row; one that begins with a longer sequence may have twice its length.
    """
    rows: list[Row] = []
    row: list[Segment] = []
    previous: tuple[int, ...] = ()
    for number in sorted(range(len(sequences)), key=lambda number: sequences[number]):
        sequence = sequences[number]
        num_shared = count_shared(previous, sequence)
        num_row = row[-1].stop if row else 0
        num_new = len(sequence) - num_shared
        limit = max(max_tokens, 2 * len(sequence))
        if num_row + num_new > limit or not _saves_work(num_row, num_shared, num_new):
            if row:
                rows.append(tuple(row))
            row, num_row, num_shared, num_new = [], 0, 0, len(sequence)
        row.append(Segment(number, num_shared, num_row, num_row + num_new))
        previous = sequence
    return [*rows, tuple(row)] if row else rows


def plan_batches(rows: Sequence[Row], *, max_tokens: int) -> list[list[Row]]:
    """Rows of similar length side by side, the longest first, so that padding is little.

    Args:
        rows: from `plan_rows`.
        max_tokens: of a batch, padding included; a longer row is a batch of its own.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row[-1].stop):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0][-1].stop > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def pack_row(row: Row, sequences: Sequence[tuple[int, ...]]) -> PackedRow:
    """The arrays of a row."""
    length = row[-1].stop
    token_ids = np.empty(length, dtype=np.int64)
    positions = np.empty(length, dtype=np.int64)
    sees = np.zeros((length, length), dtype=bool)
    paths = {}
    path = np.empty(0, dtype=np.int64)
    for segment in row:
        shared, new = path[: segment.num_shared], slice(segment.start, segment.stop)
        path = np.concatenate([shared, np.arange(segment.start, segment.stop)])
        token_ids[new] = sequences[segment.sequence][segment.num_shared :]
        positions[new] = np.arange(segment.num_shared, len(path))
        sees[new, shared] = True
        sees[new, new] = np.tri(segment.stop - segment.start, dtype=bool)
        paths[segment.sequence] = path
    return PackedRow(token_ids, positions, sees, paths)


def make_batch(
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    sequences: Sequence[tuple[int, ...]],
    *,
    device: torch.device,
) -> Batch:
    """The tensors of a batch on a device."""
    packed = [pack_row(row, sequences) for row in rows]
    length = max(len(row.token_ids) for row in packed)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    positions = np.zeros_like(input_ids)
    mask = np.zeros((len(rows), 1, length, length), dtype=bool)
    mask[:] = np.eye(length, dtype=bool)
    for number, row in enumerate(packed):
        own = slice(len(row.token_ids))
        input_ids[number, own] = row.token_ids
        positions[number, own] = row.positions
        mask[number, 0, own, own] = row.sees
    numbers = [number for row in packed for number in row.paths]
    targets = [pairs[number].target_ids for number in numbers]
    places, read = _places(packed, pairs)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        input_ids_BT=tensor(input_ids),
        positions_BT=tensor(positions),
        mask=tensor(mask),
        places_BQ=tensor(places),
        read_K=tensor(read),
        target_K=tensor(np.concatenate(targets)),
        pair_K=np.repeat(numbers, [len(target) for target in targets]),
    )


def _places(packed: Sequence[PackedRow], pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Where targets are predicted, [B, Q], and for each of their tokens which of them."""
    found = []
    for row in packed:
        ends = [path[-len(pairs[number].target_ids) :] for number, path in row.paths.items()]
        found.append(np.unique(np.concatenate(ends), return_inverse=True))
    most = max(len(places) for places, _ in found)
    padded = [np.pad(places, (0, most - len(places)), mode="edge") for places, _ in found]
    read = [inverse + number * most for number, (_, inverse) in enumerate(found)]
    return np.stack(padded), np.concatenate(read)


def count_shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Tokens that both begin with."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _saves_work(num_row: int, num_shared: int, num_new: int) -> bool:
    """Whether a sequence costs less inside a row of `num_row` tokens than in one of its own."""
    pairs_inside = (num_row + num_new) ** 2 - num_row**2
    pairs_alone = (num_shared + num_new) ** 2
    return pairs_inside - pairs_alone <= num_shared * PAIRS_PER_TOKEN
