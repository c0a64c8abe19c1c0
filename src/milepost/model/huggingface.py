"""Hugging Face's config.json and generation_config.json, there and back. Dicts only, no files."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from milepost.config.rules import broken_rules
from milepost.config.schema import ModelSection
from milepost.core.errors import UsageError

# What LlamaConfig takes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
_DEFAULT_ROPE_THETA = 10000.0
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_HINT = "Milepost reads plain LLaMA: default rotary positions, silu, no biases, no dropout"


def hf_config(model: ModelSection, *, end_of_text_id: int, dtype: str) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Args:
        model: the architecture.
        end_of_text_id: begins and ends a document.
        dtype: of the weights in model.safetensors, "float32" or "bfloat16".

    Returns:
        Fields as transformers 4 and 5 read them; where they differ, both.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "hidden_act": model.hidden_act,
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        # transformers 4 reads rope_theta and torch_dtype, 5 rope_parameters and dtype.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def hf_generation_config(*, end_of_text_id: int) -> dict[str, Any]:
    """generation_config.json of a checkpoint folder."""
    return {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id}


def model_section_from_hf(config: dict[str, Any]) -> ModelSection:
    """The architecture that a config.json describes.

    Args:
        config: as transformers 4 or 5 writes it.

    Returns:
        The section; `residual_init` is unknown to Hugging Face and stays "plain".

    Raises:
        UsageError: a field is missing, out of range, or asks for what Milepost does not do;
            the message names it.
    """
    if config.get("model_type") != "llama":
        raise _refused("model_type", config.get("model_type"), "llama")
    for name in _SIZES:
        if name not in config:
            raise UsageError(f"config.json has no {name}", hint=_HINT)
    values = {name: config[name] for name in _SIZES}
    values |= {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    key_value_heads = config.get("num_key_value_heads")
    values["num_key_value_heads"] = (
        values["num_attention_heads"] if key_value_heads is None else key_value_heads
    )
    values["rope_theta"] = _rope_theta(config)
    section = _validated(values)
    _refuse_other_shapes(config, section)
    return section


def _rope_theta(config: dict[str, Any]) -> float:
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise _refused(name, rope, "an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise _refused(f"{name}.rope_type", kind, "default")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refused(f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    parameters = config.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        return _DEFAULT_ROPE_THETA
    if "rope_theta" in parameters and config.get("rope_theta", theta) != theta:
        raise _refused("rope_theta", config["rope_theta"], f"rope_parameters.rope_theta {theta}")
    return theta


def _validated(values: dict[str, Any]) -> ModelSection:
    try:
        section = ModelSection(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"config.json: {name} is {first['input']!r}: {first['msg']}", hint=_HINT
        ) from error
    for problem in broken_rules({f"model.{name}": value for name, value in values.items()}):
        where = problem.where.removeprefix("model.")
        raise UsageError(f"config.json: {where}: {problem.what}", hint=_HINT)
    return section


def _refuse_other_shapes(config: dict[str, Any], section: ModelSection) -> None:
    head_dim = config.get("head_dim")
    if head_dim not in (None, section.head_dim):
        raise _refused("head_dim", head_dim, f"hidden_size / heads = {section.head_dim}")
    if config.get("sliding_window") is not None:
        raise _refused("sliding_window", config["sliding_window"], "null")
    if config.get("quantization_config") is not None:
        raise _refused("quantization_config", "set", "null")


def _refused(name: str, value: Any, allowed: str) -> UsageError:
    return UsageError(f"config.json: {name} is {value!r}, only {allowed} can be read", hint=_HINT)
