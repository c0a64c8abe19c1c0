"""Loss on the fixed validation set: the same numbers on any number of ranks.

The rows and how they are grouped depend on the data and the microbatch only; groups are dealt
to ranks, row sums are gathered and added in row order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from milepost.core.units import bits_per_byte
from milepost.distributed.reduce import gather_in_rank_order
from milepost.distributed.world import World
from milepost.model.attention import document_mask, mask_inside
from milepost.model.llama import Llama
from milepost.model.loss import token_nats


@dataclass(frozen=True)
class ValidationSet:
    """The rows that are scored, in order.

    Attributes:
        inputs: [R, T] token ids.
        targets: [R, T] token ids, -1 where padding.
        num_bytes: UTF-8 bytes of the text that the targets stand for.
        document_separator: the end-of-text id if attention stays inside documents, else None.
        documents: [R, T], as in a training batch; None where the inputs alone say what is
            attended to.
    """

    inputs: np.ndarray
    targets: np.ndarray
    num_bytes: int
    document_separator: int | None = None
    documents: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Target tokens."""
        return int((self.targets >= 0).sum())


@dataclass(frozen=True)
class ValidationResult:
    """Mean nats per token, and bits per byte of the text (None without text)."""

    loss_nats: float
    bits_per_byte: float | None
    num_tokens: int
    seconds: float


@torch.no_grad()
def validate(
    model: Llama,
    *,
    rows: ValidationSet,
    microbatch_rows: int,
    compute_dtype: torch.dtype,
    chunk_rows: int,
    world: World,
    stop_requested: Callable[[], bool] = lambda: False,
) -> ValidationResult | None:
    """Scores the whole set; every rank must call, every rank gets the result.

    Args:
        model: not compiled, so that training's compiled code never sees another shape.
        rows: the validation set.
        microbatch_rows: rows of one forward pass; part of the numbers' last bits.
        compute_dtype: as in training.
        chunk_rows: rows whose logits exist at once.
        world: of this process.
        stop_requested: asked before each forward pass; if any rank says yes, the scoring is
            given up and every rank gets None.
    """
    started = time.monotonic()
    num_rows, length = rows.inputs.shape
    num_groups = -(-num_rows // microbatch_rows)
    groups_per_rank = -(-num_groups // world.size)
    sums = torch.zeros(groups_per_rank * microbatch_rows, dtype=torch.float64, device=world.device)
    first_group = world.rank * groups_per_rank
    is_stopping = False
    for group in range(first_group, min(first_group + groups_per_rank, num_groups)):
        if is_stopping := stop_requested():
            break
        start = group * microbatch_rows
        inputs = _padded(rows.inputs[start : start + microbatch_rows], microbatch_rows, fill=0)
        targets = _padded(rows.targets[start : start + microbatch_rows], microbatch_rows, fill=-1)
        inputs, targets = inputs.to(world.device), targets.to(world.device)
        mask = None
        if rows.documents is not None:
            of_group = rows.documents[start : start + microbatch_rows]
            mask = mask_inside(_padded(of_group, microbatch_rows, fill=0).to(world.device))
        elif rows.document_separator is not None:
            mask = document_mask(inputs, end_of_text_id=rows.document_separator)
        hidden = model(inputs, compute_dtype=compute_dtype, mask=mask)
        nats = token_nats(
            hidden.flatten(0, 1), model.head_weight, targets.flatten(), chunk_rows=chunk_rows
        )
        place = (group - first_group) * microbatch_rows
        sums[place : place + microbatch_rows] = nats.view(-1, length).double().sum(dim=1)
    flag = torch.tensor([float(is_stopping)], dtype=torch.float64, device=world.device)
    gathered = gather_in_rank_order(torch.cat([sums, flag]), world=world).cpu()
    if gathered[:, -1].any():
        return None
    total_nats = sum(gathered[:, :-1].flatten().tolist()[:num_rows])
    return ValidationResult(
        loss_nats=total_nats / rows.num_tokens,
        bits_per_byte=bits_per_byte(total_nats=total_nats, num_bytes=rows.num_bytes),
        num_tokens=rows.num_tokens,
        seconds=time.monotonic() - started,
    )


def _padded(rows: np.ndarray, num_rows: int, *, fill: int) -> torch.Tensor:
    missing = num_rows - rows.shape[0]
    if missing:
        rows = np.concatenate([rows, np.full((missing, rows.shape[1]), fill, rows.dtype)])
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))
