"""A global batch: what counts as a target, and what its hash is over."""

from __future__ import annotations

import numpy as np
import torch

from milepost.data.batch import Batch
from milepost.data.loader import batch_sha256
from milepost.model.attention import document_mask, mask_inside

ROWS = np.arange(12, dtype=np.uint32).reshape(2, 6)


def test_running_text_has_a_target_at_every_place_and_the_hash_of_its_rows() -> None:
    batch = Batch.of_tokens(ROWS)
    assert batch.num_targets == 10
    assert batch.num_rows == 2
    assert batch.inputs.tolist() == ROWS[:, :-1].tolist()
    assert batch.targets.tolist() == ROWS[:, 1:].tolist()
    assert batch.sha256 == batch_sha256(ROWS)


def test_targets_below_zero_are_not_counted_and_every_array_is_in_the_hash() -> None:
    ids = ROWS.astype(np.int32)
    targets = np.where(ids % 2 == 0, ids, -100)
    batch = Batch(ids, targets, np.ones_like(ids))
    assert batch.num_targets == 6
    others = [
        Batch(ids + 1, targets, np.ones_like(ids)),
        Batch(ids, ids, np.ones_like(ids)),
        Batch(ids, targets, np.zeros_like(ids)),
    ]
    assert len({batch.sha256, *(other.sha256 for other in others)}) == 4


def test_attention_stays_among_tokens_of_one_number() -> None:
    allowed = mask_inside(torch.tensor([[1, 1, 2, 2, 0]]))[0, 0]
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert allowed.int().tolist() == expected


def test_documents_that_begin_with_the_end_of_text_token_are_told_apart() -> None:
    ids = torch.tensor([[5, 0, 6, 7, 0, 8]])
    numbers = torch.tensor([[0, 1, 1, 1, 2, 2]])
    assert torch.equal(document_mask(ids, end_of_text_id=0), mask_inside(numbers))
