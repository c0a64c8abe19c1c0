"""GGUF's names, layouts and metadata of a LLaMA, there and back. No files, no gguf package.

As llama.cpp defines them for the architecture `llama` (its gguf-py constants and conversion).
Its rotary positions turn the neighbors 2i and 2i + 1, Hugging Face's the halves i and i + H/2,
so the rows of the query and key projections are in another order there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from milepost.config.schema import ModelSection

ARCHITECTURE = "llama"

_OUTSIDE_BLOCKS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_BLOCKS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """GGUF's name of a parameter: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    layer, suffix = name.rpartition(".")[::2]
    if layer in _OUTSIDE_BLOCKS:
        return f"{_OUTSIDE_BLOCKS[layer]}.{suffix}"
    number, part = layer.removeprefix("model.layers.").split(".", maxsplit=1)
    return f"blk.{number}.{_IN_BLOCKS[part]}.{suffix}"


def to_gguf_rows(name: str, weight: Tensor, *, model: ModelSection) -> Tensor:
    """A parameter with its rows as GGUF orders them; most stay as they are.

    Args:
        name: Hugging Face's.
        weight: [heads x H, D] of a query or key projection, any shape of another parameter.
        model: the architecture.
    """
    heads = _turned_heads(name, model)
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, model.head_dim // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def from_gguf_rows(name: str, weight: Tensor, *, model: ModelSection) -> Tensor:
    """What `to_gguf_rows` made of a parameter, turned back."""
    heads = _turned_heads(name, model)
    if heads is None:
        return weight
    pairs = weight.reshape(heads, model.head_dim // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _turned_heads(name: str, model: ModelSection) -> int | None:
    if name.endswith(".q_proj.weight"):
        return model.num_attention_heads
    return model.num_key_value_heads if name.endswith(".k_proj.weight") else None


def gguf_metadata(model: ModelSection) -> dict[str, Any]:
    """The architecture under GGUF's keys."""
    values = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "block_count": model.num_hidden_layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": model.num_key_value_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": model.rms_norm_eps,
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": model.rope_theta,
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}
