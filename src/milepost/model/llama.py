"""LLaMA: embedding, blocks, final norm. The head is applied by the loss or by the engine.

Parameter names and rotary layout are those of Hugging Face's LlamaForCausalLM, so import and
export are a copy. Nothing here knows of distribution, files or training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from milepost.config.schema import ModelSection
from milepost.model.attention import Attention, LayerCache
from milepost.model.layers import Embedding, FeedForward, Linear, RMSNorm
from milepost.model.rope import rope_tables


class Cache(Protocol):
    """Keys and values of earlier forward passes, and where each row stands."""

    def begin(self, num_new: int) -> tuple[Tensor, Tensor | None]:
        """Positions [B, T] int64 of the new tokens, and their mask [B, 1, T, S] or None."""

    def layer(self, index: int) -> LayerCache:
        """The part of one layer."""

    def finish(self) -> None:
        """The new tokens are in every layer."""


class Block(nn.Module):
    """Attention, then feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, mask, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def forward_packed(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        places_BQ: Tensor | None = None,
    ) -> Tensor:
        """The block's result at some places, or at all; see `Attention.forward_packed`."""
        attended = self.self_attn.forward_packed(
            self.input_layernorm(hidden), cos, sin, mask, places_BQ
        )
        if places_BQ is not None:
            rows_B1 = torch.arange(len(places_BQ), device=places_BQ.device)[:, None]
            hidden = hidden[rows_B1, places_BQ]
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def run_block(
    block: Block, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
) -> Tensor:
    """One block; training passes this function compiled, once for all blocks."""
    return block(hidden, cos, sin, mask)


RunBlock = Callable[[Block, Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Trunk(nn.Module):
    """Everything but the head, under the name `model` as in Hugging Face's files."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        cos, sin = rope_tables(
            head_dim=config.head_dim,
            num_positions=config.max_position_embeddings,
            theta=config.rope_theta,
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)


class Llama(nn.Module):
    """The model: float32 master weights, compute in the dtype that is asked for.

    Attributes:
        config: the architecture.
        head_weight: [V, D] of the head, the embedding's own where they are tied.
    """

    def __init__(self, config: ModelSection) -> None:
        """Makes the model with empty weights, on the default device (`meta` works)."""
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D] float32 of the head; the embedding's own where they are tied."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        compute_dtype: torch.dtype = torch.float32,
        mask: Tensor | None = None,
        run_block: RunBlock = run_block,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids_BT: token ids, integer.
            compute_dtype: dtype of the residual stream and all products.
            mask: bool [B, 1, T, T], True where attention is allowed; None: causal. Not
                together with a cache, which has its own.
            run_block: how one block is run; not used with a cache.
            cache: earlier keys and values; extended in place.

        Returns:
            hidden_BTD in the compute dtype.
        """
        hidden_BTD = self.model.embed_tokens(input_ids_BT).to(compute_dtype)
        if cache is None:
            num_positions = input_ids_BT.shape[1]
            cos, sin = self.model.cos[:num_positions], self.model.sin[:num_positions]
            for block in self.model.layers:
                hidden_BTD = run_block(block, hidden_BTD, cos, sin, mask)
        else:
            assert mask is None, "a cache brings its own mask"
            hidden_BTD = self._run_cached(hidden_BTD, cache)
        return self.model.norm(hidden_BTD)

    def forward_packed(
        self,
        input_ids_BT: Tensor,
        *,
        positions_BT: Tensor,
        mask: Tensor,
        places_BQ: Tensor,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        """Hidden states after the final norm, at some places of rows that hold trees of tokens.

        The last block is computed at these places only; nothing else of it would be read.

        Args:
            input_ids_BT: token ids, integer.
            positions_BT: int64, where each token stands in its own sequence.
            mask: bool [B, 1, T, T], True where attention is allowed: at the token itself, at some
                earlier places, at no later one.
            places_BQ: int64, below T.
            compute_dtype: dtype of the residual stream and all products.

        Returns:
            hidden_BQD in the compute dtype.
        """
        hidden_BTD = self.model.embed_tokens(input_ids_BT).to(compute_dtype)
        cos, sin = self.model.cos[positions_BT][:, None], self.model.sin[positions_BT][:, None]
        *blocks, last_block = self.model.layers
        for block in blocks:
            hidden_BTD = block.forward_packed(hidden_BTD, cos, sin, mask)
        hidden_BQD = last_block.forward_packed(hidden_BTD, cos, sin, mask, places_BQ)
        return self.model.norm(hidden_BQD)

    def _run_cached(self, hidden_BTD: Tensor, cache: Cache) -> Tensor:
        positions_BT, mask = cache.begin(hidden_BTD.shape[1])
        cos, sin = self.model.cos[positions_BT][:, None], self.model.sin[positions_BT][:, None]
        for index, block in enumerate(self.model.layers):
            hidden_BTD = block(hidden_BTD, cos, sin, mask, cache.layer(index))
        cache.finish()
        return hidden_BTD
