"""A model as it is decoded with: as it lies, or laid out to be faster at it.

With one new token a row a pass reads every weight once and computes little, so what counts is
how often torch is called and how fast memory is read. The blocks of `FastDecoder` are those of
`model`, with products side by side; `packed` lays a matrix out for it, `ScreenedHead` reads less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.config.schema import ModelSection
from milepost.inference.kv_cache import KVCache
from milepost.inference.sampling import likeliest_tokens
from milepost.inference.screened_head import ScreenedHead
from milepost.model.llama import Block, Llama
from milepost.model.packed_weight import Product, packed

SMALLEST_SCREENED_BYTES = 8 << 20
"""Of a head; a smaller one is multiplied sooner than screened: 0.4 ms in place of 0.9 for 6 MB
and one hidden state, 0.8 in place of 2.4 for eight (AMD EPYC, one thread)."""


class Decoder(Protocol):
    """What decoding needs of a model."""

    @property
    def config(self) -> ModelSection:
        """The architecture."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of hidden states, keys and values."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def read(self, ids_BT: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, T, D] after the final norm, of prompts."""

    def step(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, D] after the final norm, of one new token a row."""

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V] float32 on the CPU, of the tokenizer's ids only."""

    def likeliest(self, hidden_BD: Tensor) -> list[int]:
        """The id of the largest logit of each row, of equals the first.

        Raises:
            DivergedError: the logits are not finite.
        """


class PlainDecoder:
    """A model as it lies, which others may train or change meanwhile."""

    def __init__(self, model: Llama, *, compute_dtype: torch.dtype, vocab_size: int) -> None:
        self.config = model.config
        self.compute_dtype = compute_dtype
        self.device = model.head_weight.device
        self._model = model
        self._vocab_size = vocab_size

    def read(self, ids_BT: Tensor, cache: KVCache) -> Tensor:
        """See `Decoder.read`."""
        return self._model(ids_BT, compute_dtype=self.compute_dtype, cache=cache)

    def step(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """See `Decoder.step`."""
        return self.read(ids_B[:, None], cache)[:, -1]

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        weight_VD = self._model.head_weight[: self._vocab_size]
        return F.linear(hidden_BD, weight_VD.to(hidden_BD.dtype)).float().cpu()

    def likeliest(self, hidden_BD: Tensor) -> list[int]:
        """See `Decoder.likeliest`."""
        return likeliest_tokens(self.logits(hidden_BD))


@dataclass(frozen=True)
class _Layer:
    """One block: norms in float32, and products in the compute dtype."""

    attention_norm: Tensor
    qkv: Product
    out: Product
    feed_forward_norm: Tensor
    gate_up: Product
    down: Product


class FastDecoder:
    """Takes a model over for decoding; nothing else may train or change it afterwards.

    Its weights are rounded to the compute dtype and laid out side by side, in place; `model` goes
    on working and computes what it did in that dtype. On the CPU decoding has copies of its own:
    of the blocks' matrices as many bytes again, of a large head a byte a weight for the likeliest
    token, and once `logits` was asked for as many bytes again as the head has.

    Attributes:
        model: for all but decoding.
        config: the architecture.
        compute_dtype: of the forward pass.
    """

    @torch.no_grad()
    def __init__(self, model: Llama, *, compute_dtype: torch.dtype, vocab_size: int) -> None:
        """Lays the weights out.

        Args:
            model: without LoRA's additions, which are merged before.
            compute_dtype: of the forward pass.
            vocab_size: of the tokenizer; ids beyond it are never chosen.
        """
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
                parameter.data = parameter.data.to(compute_dtype)
        self.model = model
        self.config = model.config
        self.device = model.head_weight.device
        self.compute_dtype = compute_dtype
        self._layers = [_laid_out(block) for block in model.model.layers]
        self._cos = torch.cat([model.model.cos, model.model.cos], dim=1)
        # One product with the swapped halves in place of two with each half.
        self._sin = torch.cat([-model.model.sin, model.model.sin], dim=1)
        self._head_VD = model.head_weight[:vocab_size]
        is_large = self._head_VD.nbytes >= SMALLEST_SCREENED_BYTES
        self._screened = ScreenedHead.of(self._head_VD) if is_large else None

    def read(self, ids_BT: Tensor, cache: KVCache) -> Tensor:
        """See `Decoder.read`."""
        positions_BT, mask = cache.begin(ids_BT.shape[1])
        cos_BT1H, sin_BT1H = (
            self._cos[positions_BT][:, :, None],
            self._sin[positions_BT][:, :, None],
        )

        def attend(qkv_BTE: Tensor, index: int) -> Tensor:
            query, keys, values = self._heads(qkv_BTE, cos_BT1H, sin_BT1H)
            keys_BGSH, values_BGSH = cache.layer(index).extend(
                keys.transpose(1, 2), values.transpose(1, 2)
            )
            attended_BNTH = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                keys_BGSH,
                values_BGSH,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
            return attended_BNTH.transpose(1, 2).flatten(2)

        return self._run(ids_BT, attend, cache)

    def step(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """See `Decoder.step`."""
        positions_B, mask = cache.begin_step()
        cos_B1H, sin_B1H = self._cos[positions_B][:, None], self._sin[positions_B][:, None]

        def attend(qkv_BE: Tensor, index: int) -> Tensor:
            query, keys, values = self._heads(qkv_BE, cos_B1H, sin_B1H)
            keys_BGSH, values_BGSH = cache.layer(index).extend_step(keys, values)
            # Queries that share keys stand where positions usually do: nothing is repeated.
            query_BGQH = query.unflatten(1, (self.config.num_key_value_heads, -1))
            return F.scaled_dot_product_attention(
                query_BGQH, keys_BGSH, values_BGSH, attn_mask=mask
            ).flatten(1)

        return self._run(ids_B, attend, cache)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        return self._head(hidden_BD).float().cpu()

    def likeliest(self, hidden_BD: Tensor) -> list[int]:
        """See `Decoder.likeliest`."""
        if self._screened is None:
            return likeliest_tokens(self.logits(hidden_BD))
        return self._screened.likeliest(hidden_BD)

    @cached_property
    def _head(self) -> Product:
        return packed(self._head_VD)

    def _run(self, ids: Tensor, attend: Callable[[Tensor, int], Tensor], cache: KVCache) -> Tensor:
        """Hidden states [..., D] after the final norm of tokens [...].

        `attend` takes queries, keys and values side by side, and the layer's number.
        """
        hidden = self.model.model.embed_tokens.weight[ids]
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(self._layers):
            attended = attend(layer.qkv(_norm(hidden, layer.attention_norm, eps)), index)
            hidden = hidden + layer.out(attended)
            gate, up = layer.gate_up(_norm(hidden, layer.feed_forward_norm, eps)).chunk(2, dim=-1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        cache.finish()
        return _norm(hidden, self.model.model.norm.weight, eps)

    def _heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., N, H], keys and values [..., G, H], the first two rotated."""
        num_queries, num_keys = self.config.num_attention_heads, self.config.num_key_value_heads
        head_dim = self.config.head_dim
        heads = qkv.unflatten(-1, (-1, head_dim))
        turned = heads[..., : num_queries + num_keys, :].float()
        turned = turned * cos + turned.roll(head_dim // 2, dims=-1) * sin
        turned = turned.to(qkv.dtype)
        values = heads[..., num_queries + num_keys :, :]
        return turned[..., :num_queries, :], turned[..., num_queries:, :], values


def _laid_out(block: Block) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    return _Layer(
        attention_norm=block.input_layernorm.weight.data,
        qkv=packed(_side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])),
        out=packed(attention.o_proj.weight.data),
        feed_forward_norm=block.post_attention_layernorm.weight.data,
        gate_up=packed(_side_by_side([mlp.gate_proj, mlp.up_proj])),
        down=packed(mlp.down_proj.weight.data),
    )


def _side_by_side(layers: list[torch.nn.Module]) -> Tensor:
    """One weight for layers of one input; theirs become parts of it."""
    parameters = [layer.weight for layer in layers]
    together = torch.cat([parameter.data for parameter in parameters])
    parts = together.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return together


def _norm(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `layers.RMSNorm`, operation by operation, so that the bits are equal."""
    wide = hidden.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight_D).to(hidden.dtype)
