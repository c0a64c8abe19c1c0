"""Batches: a function of the step."""

from __future__ import annotations

import hashlib
from types import TracebackType
from typing import Self

import numpy as np

from milepost.core.errors import DataError
from milepost.data.order import row_ids
from milepost.data.shards import ShardSet

IGNORED_TARGET = -1
"""Target of a position that has none."""


class Loader:
    """Global batches of training rows; it has no state, so a step may be read at any time."""

    def __init__(
        self, shards: ShardSet, *, seed: int, sequence_length: int, rows_per_step: int
    ) -> None:
        """Row r is tokens [r * T, r * T + T + 1): neighbors share one token.

        Args:
            shards: where the tokens lie.
            seed: of the run; with the shards' fingerprint it fixes the order.
            sequence_length: T, tokens of a row.
            rows_per_step: rows of a global batch, the same for any number of ranks.

        Raises:
            DataError: the shards have fewer rows than one batch.
        """
        self.num_rows = max(shards.num_tokens - 1, 0) // sequence_length
        if self.num_rows < rows_per_step:
            raise DataError(
                f"{shards.num_tokens} training tokens are {self.num_rows} rows of "
                f"{sequence_length}, fewer than the {rows_per_step} of one batch",
                hint="prepare more text, or lower train.global_batch_tokens or "
                "data.sequence_length",
            )
        self._shards = shards
        self._seed = seed
        self._sequence_length = sequence_length
        self._rows_per_step = rows_per_step

    def batch(self, data_step: int) -> np.ndarray:
        """The global batch of a step, uint32 [rows_per_step, T + 1].

        Raises:
            DataError: a shard is missing or shorter than its manifest says.
        """
        length = self._sequence_length
        batch = np.empty((self._rows_per_step, length + 1), dtype=np.uint32)
        for place, row in enumerate(self.row_ids(data_step)):
            batch[place] = self._shards.read(int(row) * length, length + 1)
        return batch

    def row_ids(self, data_step: int) -> np.ndarray:
        """Which rows the batch of a step is made of, int64 [rows_per_step]."""
        return row_ids(
            fingerprint=self._shards.fingerprint,
            seed=self._seed,
            data_step=data_step,
            rows_per_step=self._rows_per_step,
            num_rows=self.num_rows,
        )

    def close(self) -> None:
        """Closes the shards."""
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def batch_sha256(batch: np.ndarray) -> str:
    """Hash of a global batch's token ids as little-endian uint32, rows in order."""
    return hashlib.sha256(np.ascontiguousarray(batch, dtype="<u4").tobytes()).hexdigest()


def sequential_rows(
    shards: ShardSet, *, sequence_length: int, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first rows in order, for validation; the last one may be partly filled.

    Args:
        shards: of the validation set.
        sequence_length: T, tokens of a row.
        max_tokens: at most so many target tokens.

    Returns:
        (inputs, targets), both int64 [R, T]; targets are -1 where there is none, inputs 0.

    Raises:
        DataError: there is not one target token, or a shard is damaged.
    """
    num_targets = min(shards.num_tokens - 1, max_tokens)
    if num_targets < 1:
        raise DataError(
            f"the validation set of {shards.num_tokens} tokens has no target token",
            hint="prepare the data with more validation text",
        )
    num_rows = -(-num_targets // sequence_length)
    inputs = np.zeros(num_rows * sequence_length, dtype=np.int64)
    targets = np.full(num_rows * sequence_length, IGNORED_TARGET, dtype=np.int64)
    tokens = shards.read(0, num_targets + 1)
    inputs[:num_targets] = tokens[:-1]
    targets[:num_targets] = tokens[1:]
    shape = (num_rows, sequence_length)
    return inputs.reshape(shape), targets.reshape(shape)
