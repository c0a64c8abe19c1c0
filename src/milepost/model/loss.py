"""Cross-entropy of the next token, in chunks of rows: tokens x V never exists at once.

The gradients are computed in the forward pass, chunk by chunk, while the logits are at hand;
nothing of them is kept or computed twice. Products are in the dtype of the hidden states,
softmax and sums in float32, the weight's gradient is summed over chunks in float32. The order
is fixed, so the same input gives the same bits. Nothing waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 16-bit products with 50304 columns in place of 50257: the weight's gradient took 93 ms in
# place of 120 (512 rows, D = 384, one core with AVX512-BF16). float32 gained nothing.
_COLUMN_MULTIPLE = 64

# Rows whose float32 logits stay in the cache of one core between the passes over them; 34 ms
# in place of 45 for 512 rows. On a GPU each launch costs more than that saves.
_CPU_BLOCK_ROWS = 16


def training_loss(
    hidden_ND: Tensor, head_weight_VD: Tensor, targets_N: Tensor, *, scale: float, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Scaled sum of nats, with gradients for hidden states and head.

    Args:
        hidden_ND: after the final norm, in the compute dtype.
        head_weight_VD: float32 masters.
        targets_N: token ids int64; below 0: the row is ignored.
        scale: factor of the sum, such as 1 / target tokens of the global batch.
        chunk_rows: rows whose logits exist at once: chunk_rows x V in the compute dtype.

    Returns:
        (loss, nats_N): scale x sum of nats, float32 scalar, whose backward must be called
        with gradient 1, as the gradients are ready by then; and each row's nats, float32,
        detached, 0 where ignored.
    """
    return _ChunkedCrossEntropy.apply(hidden_ND, head_weight_VD, targets_N, scale, chunk_rows)


@torch.no_grad()
def token_nats(
    hidden_ND: Tensor, head_weight_VD: Tensor, targets_N: Tensor, *, chunk_rows: int
) -> Tensor:
    """Each row's nats without gradient; arguments as in `training_loss`.

    Returns:
        nats_N float32, 0 where the target is below 0.
    """
    work = _Work(hidden_ND, head_weight_VD, chunk_rows=chunk_rows)
    nats_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    for rows in work.chunks():
        logits_CV = work.logits(hidden_ND[rows])
        for inner in work.blocks(logits_CV):
            targets, nats = targets_N[rows][inner], nats_N[rows][inner]
            work.exponentials(logits_CV[inner], targets, nats)
    return nats_N


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_weight_VD: Tensor,
        targets_N: Tensor,
        scale: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        work = _Work(hidden_ND, head_weight_VD, chunk_rows=chunk_rows)
        nats_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD: Tensor | None = None
        if ctx.needs_input_grad[1]:  # not where the head is frozen, as beside LoRA
            grad_weight_VD = torch.zeros_like(head_weight_VD, dtype=torch.float32)
        for rows in work.chunks():
            logits_CV = work.logits(hidden_ND[rows])
            for inner in work.blocks(logits_CV):
                targets, nats = targets_N[rows][inner], nats_N[rows][inner]
                work.replace_by_gradient(logits_CV[inner], targets, nats, scale=scale)
            torch.mm(logits_CV, work.weight, out=grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                work.add_weight_gradient(grad_weight_VD, logits_CV, hidden_ND[rows])
        ctx.gradients = (grad_hidden_ND, grad_weight_VD)
        ctx.mark_non_differentiable(nats_N)
        ctx.set_materialize_grads(False)
        return (nats_N.sum(dtype=torch.float64) * scale).float(), nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_nats: None) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.gradients
        ctx.gradients = None
        return grad_hidden_ND, grad_weight_VD, None, None, None


class _Work:
    """The weight in the compute dtype, and the buffers of one call."""

    def __init__(self, hidden_ND: Tensor, head_weight_VD: Tensor, *, chunk_rows: int) -> None:
        self.num_rows, width = hidden_ND.shape
        self.vocab_size = head_weight_VD.shape[0]
        self.chunk_rows = max(1, min(chunk_rows, self.num_rows))
        dtype, device = hidden_ND.dtype, hidden_ND.device
        self.is_wide = dtype == torch.float32
        num_columns = self.vocab_size
        if self.is_wide:
            self.weight = head_weight_VD
        else:
            num_columns += -num_columns % _COLUMN_MULTIPLE
            self.weight = torch.zeros(num_columns, width, dtype=dtype, device=device)
            self.weight[: self.vocab_size].copy_(head_weight_VD)
        self._logits = torch.empty(self.chunk_rows, num_columns, dtype=dtype, device=device)
        self._block_rows = self.chunk_rows
        if device.type == "cpu":
            self._block_rows = min(_CPU_BLOCK_ROWS, self.chunk_rows)
        if not self.is_wide:
            shape = (self._block_rows, self.vocab_size)
            self._wide = torch.empty(shape, dtype=torch.float32, device=device)
        self._product: Tensor | None = None

    def chunks(self) -> list[slice]:
        return _slices(self.num_rows, self.chunk_rows)

    def blocks(self, logits_CV: Tensor) -> list[slice]:
        return _slices(logits_CV.shape[0], self._block_rows)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        return torch.mm(hidden_CD, self.weight.t(), out=self._logits[: hidden_CD.shape[0]])

    def exponentials(self, logits: Tensor, targets: Tensor, nats: Tensor) -> tuple[Tensor, Tensor]:
        """Fills `nats`; returns exp(logit - row's maximum) in float32 and its row sums [*, 1]."""
        if self.is_wide:
            wide = logits
        else:
            wide = self._wide[: logits.shape[0]].copy_(logits[:, : self.vocab_size])
        wide.sub_(wide.amax(dim=1, keepdim=True))
        of_target = wide.gather(1, targets.clamp(min=0)[:, None])
        sums = wide.exp_().sum(dim=1, keepdim=True)
        nats.copy_((sums.log() - of_target).squeeze(1) * (targets >= 0))
        return wide, sums

    def replace_by_gradient(
        self, logits: Tensor, targets: Tensor, nats: Tensor, *, scale: float
    ) -> None:
        """Fills `nats` and turns logits into scale x (softmax - one-hot); padding stays 0."""
        wide, sums = self.exponentials(logits, targets, nats)
        index = targets.clamp(min=0)[:, None]
        with _plain_scatter():
            wide.scatter_(1, index, wide.gather(1, index) - sums)
        wide.mul_((targets >= 0)[:, None] * scale / sums)
        if not self.is_wide:
            logits[:, : self.vocab_size].copy_(wide)

    def add_weight_gradient(
        self, grad_weight_VD: Tensor, grad_logits_CV: Tensor, hidden_CD: Tensor
    ) -> None:
        if self.is_wide:
            grad_weight_VD.addmm_(grad_logits_CV.t(), hidden_CD)
            return
        if self._product is None:
            self._product = torch.empty_like(self.weight)
        torch.mm(grad_logits_CV.t(), hidden_CD, out=self._product)
        grad_weight_VD.add_(self._product[: self.vocab_size])


@contextlib.contextmanager
def _plain_scatter() -> Iterator[None]:
    """Lets CUDA scatter directly: one index a row writes no place twice, so the order is free.

    torch's own deterministic scatter gives the same, but waits for the device to check the
    indices, several times a chunk.
    """
    was_enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warn_only)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
