"""The order of rows: a keyed permutation an epoch, as a function of the step alone.

No table is kept: a Feistel network over the next power of four, walked until it lands inside,
permutes 10^10 rows as cheaply as ten. All arithmetic is on unsigned 64-bit integers, so the
order is the same on every machine.
"""

from __future__ import annotations

import hashlib

import numpy as np

NUM_ROUNDS = 8
"""Luby and Rackoff (1988) need four of ideal functions; small domains profit from more."""

MAX_ROWS = 1 << 62


def row_ids(
    *, fingerprint: str, seed: int, data_step: int, rows_per_step: int, num_rows: int
) -> np.ndarray:
    """The rows of one global batch.

    Args:
        fingerprint: of the shards, so that other data has another order.
        seed: of the run.
        data_step: which batch, from 0.
        rows_per_step: rows of a batch.
        num_rows: rows of an epoch; each comes once in every epoch, then a new order begins.

    Returns:
        int64 [rows_per_step].
    """
    assert data_step >= 0 and rows_per_step >= 1 and 1 <= num_rows <= MAX_ROWS
    first, end = data_step * rows_per_step, (data_step + 1) * rows_per_step
    parts = []
    for epoch in range(first // num_rows, (end - 1) // num_rows + 1):
        begin = max(first - epoch * num_rows, 0)
        stop = min(end - epoch * num_rows, num_rows)
        positions = np.arange(begin, stop, dtype=np.uint64)
        keys = _round_keys(fingerprint, seed, epoch)
        parts.append(_permute(positions, keys=keys, num_rows=num_rows))
    return np.concatenate(parts)


def _round_keys(fingerprint: str, seed: int, epoch: int) -> np.ndarray:
    text = f"milepost order 1\x1f{fingerprint}\x1f{seed}\x1f{epoch}"
    digest = hashlib.shake_256(text.encode()).digest(8 * NUM_ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _permute(positions: np.ndarray, *, keys: np.ndarray, num_rows: int) -> np.ndarray:
    half_bits = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    places = _feistel(positions, keys=keys, half_bits=half_bits)
    outside = np.flatnonzero(places >= num_rows)
    while outside.size:  # at most three of four places lie outside
        places[outside] = _feistel(places[outside], keys=keys, half_bits=half_bits)
        outside = outside[places[outside] >= num_rows]
    return places.astype(np.int64)


def _feistel(values: np.ndarray, *, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014, figure 17)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
