"""Grouped-query attention (Ainslie et al. 2023) and the mask that keeps it in a document."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milepost.config.schema import ModelSection
from milepost.model.layers import Linear
from milepost.model.rope import rotate


class LayerCache(Protocol):
    """Keys and values of one layer from earlier forward passes."""

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, G, T, H] new ones; returns all there are to attend to, [B, G, S, H]."""


class Attention(nn.Module):
    """Causal self-attention with N query heads that share G key/value heads."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            hidden: [B, T, D] in the compute dtype.
            cos: rotary table [T, H/2] or [B, 1, T, H/2] float32.
            sin: as `cos`.
            mask: bool [B, 1, T, S], True where attention is allowed; None: causal, T = S.
            cache: where keys and values of earlier positions lie.

        Returns:
            [B, T, D] in the compute dtype.
        """
        query_BNTH = rotate(self._heads(self.q_proj(hidden)), cos, sin)
        keys_BGSH = rotate(self._heads(self.k_proj(hidden)), cos, sin)
        values_BGSH = self._heads(self.v_proj(hidden))
        if cache is not None:
            keys_BGSH, values_BGSH = cache.extend(keys_BGSH, values_BGSH)
        elif mask is not None or hidden.dtype == torch.float32:
            # CUDA's kernels share heads only in 16 bits and without a mask; otherwise
            # enable_gqa falls back to one that holds T x T scores.
            num_sharing = query_BNTH.shape[1] // keys_BGSH.shape[1]
            keys_BGSH = _repeat_heads(keys_BGSH, times=num_sharing)
            values_BGSH = _repeat_heads(values_BGSH, times=num_sharing)
        attended_BNTH = F.scaled_dot_product_attention(
            query_BNTH,
            keys_BGSH,
            values_BGSH,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return self.o_proj(attended_BNTH.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _repeat_heads(heads_BGSH: Tensor, *, times: int) -> Tensor:
    """[B, G, S, H] -> [B, G x times, S, H], each head `times` times in a row."""
    return heads_BGSH[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def document_mask(input_ids_BT: Tensor, *, end_of_text_id: int) -> Tensor:
    """Where attention is allowed if it must stay inside a document.

    A document begins at its end-of-text token; what stands before the first one in a row is
    the rest of a document that began in an earlier row.

    Returns:
        bool [B, 1, T, T]: causal, and in the same document.
    """
    document_BT = (input_ids_BT == end_of_text_id).cumsum(dim=1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    length = input_ids_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=input_ids_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]
