"""Causal attention in bfloat16 on a CPU: torch's forward pass and a faster backward pass.

torch's backward pass takes twice the time of this one and gives keys and values that heads share
a gradient of 16 bits a head, summed in 16 bits; here the sum is in float32. Scores and their
gradients are float32, as in torch's. Memory grows with T, not with T x T.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Positions whose scores exist at once. With 8 rows of 512 positions, 6 heads on 2, H = 64: 66 ms
# with 128, 68 with 64, 79 with 256; torch's own 105 (one core with AVX512-BF16).
_BLOCK = 128

_LOG2_E = 1 / math.log(2)


def attend_causally(query_BNTH: Tensor, keys_BGTH: Tensor, values_BGTH: Tensor) -> Tensor:
    """[B, T, N, H] bfloat16 contiguous: softmax of the causal scores over the root of H, x values.

    Args:
        query_BNTH: bfloat16.
        keys_BGTH: as the queries; N / G query heads in a row share one.
        values_BGTH: as the keys.
    """
    attended_BTNH, _ = _forward(query_BNTH, keys_BGTH, values_BGTH)
    return attended_BTNH


# Operators of torch, so that a compiled block takes them as they are.


@torch.library.custom_op("milepost::causal_attention", mutates_args=())
def _forward(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attended [B, T, N, H], and ln of the sums of exponentials [B, N, T] float32."""
    times = query.shape[1] // keys.shape[1]
    attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1), 0.0, True
    )
    return attended.transpose(1, 2).contiguous(), log_sums.contiguous()


@_forward.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, length, width = query.shape
    log_sums = query.new_empty(rows, heads, length, dtype=torch.float32)
    return query.new_empty(rows, length, heads, width), log_sums


@torch.library.custom_op("milepost::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, attended: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values with positions before heads, [B, T, *, H]."""
    gradients = _empty_gradients(query, keys)
    workspace = _Workspace(query, keys)
    for row in range(len(query)):
        workspace.run(
            grad[row].transpose(0, 1),
            query[row],
            keys[row],
            values[row],
            attended[row].transpose(0, 1),
            log_sums[row],
            results=[gradient[row] for gradient in gradients],
        )
    return gradients


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, attended: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(query, keys)


def _empty_gradients(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, length, width = query.shape
    of_query = query.new_empty(rows, length, heads, width)
    of_keys = query.new_empty(rows, length, keys.shape[1], width)
    return of_query, of_keys, torch.empty_like(of_keys)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, grad: Tensor, grad_of_sums: None) -> tuple[Tensor, ...]:
    return tuple(g.transpose(1, 2) for g in _backward(grad, *ctx.saved_tensors))


_forward.register_autograd(_gradients, setup_context=_keep_for_backward)


class _Workspace:
    """Buffers of one backward pass, used again for each row of the batch.

    The R = N / G queries of one position that share a head of keys are neighbors, Q = T x R, so
    that a block of positions is one slice and a product sums over the heads.
    """

    def __init__(self, query: Tensor, keys: Tensor) -> None:
        _, heads, self.length, self.width = query.shape
        self.groups = keys.shape[1]
        self.sharing = heads // self.groups
        self.scale = 1 / math.sqrt(self.width)
        size = self.groups * min(_BLOCK, self.length) * self.sharing * self.length
        self.scores, self.slopes = query.new_empty(2, size, dtype=torch.float32)
        self.shares, self.rounded = query.new_empty(2, size)
        places = torch.arange(min(_BLOCK, self.length))
        is_later = places.repeat_interleave(self.sharing)[:, None] < places
        self.mask_QS = torch.zeros(is_later.shape).masked_fill_(is_later, -math.inf)

    def run(
        self,
        grad_NTH: Tensor,
        query_NTH: Tensor,
        keys_GTH: Tensor,
        values_GTH: Tensor,
        attended_NTH: Tensor,
        log_sums_NT: Tensor,
        *,
        results: list[Tensor],
    ) -> None:
        """Fills the gradients of one row of the batch: [T, N, H], [T, G, H], [T, G, H]."""
        query_GQH, grad_GQH = self._grouped(query_NTH), self._grouped(grad_NTH)
        wide_query_GQH = query_GQH.float().mul_(self.scale * _LOG2_E)
        # The scale of the scores' gradients, here where it costs no rounding to 16 bits.
        wide_grad_GQH = grad_GQH.float().mul_(self.scale)
        keys_GTH = keys_GTH.contiguous()
        wide_keys_GHT = keys_GTH.float().transpose(1, 2)
        values_GHT = values_GTH.float().transpose(1, 2)
        sums_GQ1 = self._grouped(log_sums_NT[..., None]) * _LOG2_E
        means_GQ1 = (wide_grad_GQH * self._grouped(attended_NTH)).sum(-1, keepdim=True)
        of_keys_GTH = torch.zeros(keys_GTH.shape)
        of_values_GTH = torch.zeros(keys_GTH.shape)
        of_query_TGRH = results[0].unflatten(1, (self.groups, self.sharing))
        for start in range(0, self.length, _BLOCK):
            stop = min(start + _BLOCK, self.length)
            block = slice(start * self.sharing, stop * self.sharing)
            shape = (self.groups, (stop - start) * self.sharing, stop)
            num = math.prod(shape)
            scores_GQS, slopes_GQS = self.scores[:num].view(shape), self.slopes[:num].view(shape)
            torch.bmm(wide_query_GQH[:, block], wide_keys_GHT[:, :, :stop], out=scores_GQS)
            scores_GQS[:, :, start:].add_(self.mask_QS[: shape[1], : stop - start])
            scores_GQS.sub_(sums_GQ1[:, block]).exp2_()
            shares_GQS = self.shares[:num].view(shape).copy_(scores_GQS)
            torch.bmm(wide_grad_GQH[:, block], values_GHT[:, :, :stop], out=slopes_GQS)
            slopes_GQS.sub_(means_GQ1[:, block]).mul_(scores_GQS)
            rounded_GQS = self.rounded[:num].view(shape).copy_(slopes_GQS)
            of_block_GQH = torch.bmm(rounded_GQS, keys_GTH[:, :stop])
            of_block_GTRH = of_block_GQH.unflatten(1, (stop - start, self.sharing))
            of_query_TGRH[start:stop].copy_(of_block_GTRH.transpose(0, 1))
            of_values_GTH[:, :stop] += torch.bmm(shares_GQS.transpose(1, 2), grad_GQH[:, block])
            of_keys_GTH[:, :stop] += torch.bmm(rounded_GQS.transpose(1, 2), query_GQH[:, block])
        results[1].copy_(of_keys_GTH.transpose(0, 1))
        results[2].copy_(of_values_GTH.transpose(0, 1))

    def _grouped(self, heads_NTX: Tensor) -> Tensor:
        """[N, T, X] -> [G, T x R, X], contiguous."""
        grouped_GRTX = heads_NTX.unflatten(0, (self.groups, self.sharing))
        return grouped_GRTX.transpose(1, 2).flatten(1, 2).contiguous()
