"""Cross-entropy of the next token, in chunks of rows: tokens x V never exists at once.

The gradients are computed in the forward pass, chunk by chunk, while the logits are at hand;
nothing of them is kept or computed twice. Products are in the dtype of the hidden states,
softmax and sums in float32, the weight's gradient is summed over chunks in float32. The order
is fixed, so the same input gives the same bits. Nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 16-bit products with 50304 columns in place of 50257: the weight's gradient took 93 ms in
# place of 120 (512 rows, D = 384, one core with AVX512-BF16). float32 gained nothing.
_COLUMN_MULTIPLE = 64

# Rows whose float32 logits stay in the cache of one core between the passes over them: 44 ms
# for 1024 rows with 8, 49 with 4 and 16, 57 with 2 and 32. On a GPU each launch costs more.
_CPU_BLOCK_ROWS = 8

_LOG2_E = 1 / math.log(2)
_SAFE_SUMS = (2.0**-100, 2.0**100)
"""Sums of exponentials that neither overflowed nor lost digits to numbers that are held as 0."""


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
        work.fill_nats(nats_N[rows], work.logits(hidden_ND[rows]), targets_N[rows])
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
            work.fill_nats(nats_N[rows], logits_CV, targets_N[rows], gradient_scale=scale)
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
        self._may_skip_maximum = device.type == "cpu"
        if not self.is_wide or self._may_skip_maximum:
            shape = (self._block_rows, self.vocab_size)
            self._wide = torch.empty(shape, dtype=torch.float32, device=device)
        self._product: Tensor | None = None

    def chunks(self) -> list[slice]:
        return _slices(self.num_rows, self.chunk_rows)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        return torch.mm(hidden_CD, self.weight.t(), out=self._logits[: hidden_CD.shape[0]])

    def fill_nats(
        self,
        nats_C: Tensor,
        logits_CV: Tensor,
        targets_C: Tensor,
        *,
        gradient_scale: float | None = None,
    ) -> None:
        """Fills `nats_C`; what is then left of the logits is no longer they.

        Args:
            nats_C: float32, 0 where ignored.
            logits_CV: of this call.
            targets_C: token ids, below 0 where ignored.
            gradient_scale: turns logits into this x (softmax - one-hot), 0 where ignored; the
                columns of the padding stay 0.
        """
        index_C1, is_counted_C1 = targets_C.clamp(min=0)[:, None], (targets_C >= 0)[:, None]
        # Without the padding, so that a target beyond the vocabulary is refused.
        of_target_C1 = logits_CV[:, : self.vocab_size].gather(1, index_C1).float()
        sums_C1, shifts_C1 = torch.empty_like(of_target_C1), torch.zeros_like(of_target_C1)
        factors_C1 = is_counted_C1 * (gradient_scale or 0.0)
        for rows in _slices(len(logits_CV), self._block_rows):
            logits = logits_CV[rows, : self.vocab_size]
            wide = self._exponentials(logits, sums=sums_C1[rows], shifts=shifts_C1[rows])
            if gradient_scale is not None:
                wide.mul_(factors_C1[rows] / sums_C1[rows])
                if wide is not logits:
                    logits.copy_(wide)
        of_target_C1 -= shifts_C1
        # Rounding may put the target above the sum; what is not a number stays none.
        nats_C1 = (sums_C1.log() - of_target_C1).clamp_(min=0)
        nats_C.copy_((nats_C1 * is_counted_C1).squeeze(1))
        if gradient_scale is not None:
            gradients_C1 = (of_target_C1.exp() / sums_C1 - 1) * factors_C1
            places_C = torch.arange(len(logits_CV), device=logits_CV.device)
            with _direct_writes():
                # Not scatter_, which copies all of a 16-bit tensor on the CPU.
                values_C = gradients_C1.squeeze(1).to(logits_CV.dtype)
                logits_CV.index_put_((places_C, index_C1.squeeze(1)), values_C)

    def _exponentials(self, logits: Tensor, *, sums: Tensor, shifts: Tensor) -> Tensor:
        """exp(logit - the row's shift) in float32, maybe where the logits were.

        Fills the rows' sums of them, and their shifts, which are 0 before.
        """
        if not self._may_skip_maximum:
            wide = logits if self.is_wide else self._wide[: len(logits)].copy_(logits)
            torch.amax(wide, dim=1, keepdim=True, out=shifts)
            torch.sum(wide.sub_(shifts).exp_(), dim=1, keepdim=True, out=sums)
            return wide
        # Powers of 2, 0.3 ns an element in place of exp's 1.0, and no pass for the maximum,
        # which logits of up to 69 nats do not need. The host reads the sums: not for a GPU.
        wide = self._wide[: len(logits)].copy_(logits).mul_(_LOG2_E).exp2_()
        least, most = torch.sum(wide, dim=1, keepdim=True, out=sums).aminmax()
        if not (least > _SAFE_SUMS[0] and most < _SAFE_SUMS[1]):
            # Rows that need no maximum keep their bits, whatever rows lie beside them.
            is_safe = (sums > _SAFE_SUMS[0]) & (sums < _SAFE_SUMS[1])
            shifts.copy_(logits.amax(dim=1, keepdim=True)).masked_fill_(is_safe, 0)
            wide.copy_(logits).sub_(shifts).mul_(_LOG2_E).exp2_()
            torch.sum(wide, dim=1, keepdim=True, out=sums)
        return wide

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
def _direct_writes() -> Iterator[None]:
    """Lets CUDA write directly: one index a row writes no place twice, so the order is free.

    torch's own deterministic kernel gives the same, but waits for the device to check the
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
