"""A global batch as the loop takes it: inputs, targets, and which document each token is of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from milepost.data.loader import batch_sha256


@dataclass(frozen=True)
class Batch:
    """The rows of one update, the same on every rank.

    Attributes:
        inputs: token ids [R, T].
        targets: token ids [R, T], below 0 where there is none.
        documents: integers [R, T], equal inside a document, in which attention then stays; None
            where the inputs alone say what is attended to.
    """

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None = None

    @classmethod
    def of_tokens(cls, rows: np.ndarray) -> Batch:
        """Rows [R, T + 1] of running text, in which every token is the target of the one before."""
        return cls(rows[:, :-1], rows[:, 1:])

    @property
    def num_rows(self) -> int:
        """R."""
        return self.inputs.shape[0]

    @cached_property
    def num_targets(self) -> int:
        """Target tokens: what the loss is a mean over."""
        return int((self.targets >= 0).sum())

    @property
    def sha256(self) -> str:
        """Of running text `batch_sha256`; else over all three arrays as little-endian int32."""
        if self.documents is None:
            return batch_sha256(np.concatenate([self.inputs, self.targets[:, -1:]], axis=1))
        digest = hashlib.sha256()
        for array in (self.inputs, self.targets, self.documents):
            digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
        return digest.hexdigest()


class Batches(Protocol):
    """Where batches come from: a pure function of the data step."""

    def batch(self, data_step: int) -> Batch:
        """The global batch, the same on every rank."""

    def close(self) -> None:
        """Lets go of files and threads."""
