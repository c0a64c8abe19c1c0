"""The peers from their own packages, each in the setting that is best for it.

Nothing of Milepost is imported. Every function gives an update of the same work; where a package
is missing its own ImportError is the answer, since `step.py` has looked before.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from plain_update import SummedNats, Update, nats_of_logits, plain_update
from safetensors.torch import load_file

from on_cpu.work import Work, weights_file

_CPU = torch.device("cpu")
_COLUMN_MULTIPLE = 64
"""To which litgpt's head is padded here: products with 50257 columns are slower."""


def transformers_update(work: Work, *, folder: Path) -> Update:
    """transformers' LLaMA with SDPA and autocast."""
    model = _transformers(work, folder=folder)
    return _update(_nats_of(model, work=work), model=model, work=work)


def transformers_compiled_update(work: Work, *, folder: Path) -> Update:
    """The same with model and loss in one compiled function."""
    model = _transformers(work, folder=folder)
    nats = torch.compile(_nats_of(model, work=work), dynamic=False)
    return _update(nats, model=model, work=work)


def litgpt_update(work: Work, *, folder: Path) -> Update:
    """litgpt's GPT with autocast; model and loss in one compiled function, the head padded."""
    import litgpt

    plain = work.model
    num_columns = plain["vocab_size"] + -plain["vocab_size"] % _COLUMN_MULTIPLE
    config = litgpt.Config(
        name="step",
        block_size=plain["max_position_embeddings"],
        vocab_size=plain["vocab_size"],
        padded_vocab_size=num_columns,
        n_layer=plain["num_hidden_layers"],
        n_head=plain["num_attention_heads"],
        n_embd=plain["hidden_size"],
        n_query_groups=plain["num_key_value_heads"],
        intermediate_size=plain["intermediate_size"],
        rotary_percentage=1.0,
        rope_base=int(plain["rope_theta"]),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=plain["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
    )
    model = litgpt.GPT(config)
    _take_weights(model, _under_litgpt_names(_weights(folder), num_columns=num_columns))
    model.train()
    nats = nats_of_logits(
        lambda ids: model(ids)[..., : plain["vocab_size"]],
        device=_CPU,
        dtype=getattr(torch, work.precision),
    )
    if work.is_compiled:
        nats = torch.compile(nats, dynamic=False)
    return _update(nats, model=model, work=work)


def paper_update(work: Work, *, folder: Path) -> Update:
    """The paper's own model and optimizer, as its repository trains them."""
    sys.path.insert(0, work.paper_code)
    from models.llama import LlamaConfig, LlamaTransformer

    plain = work.model
    config = LlamaConfig(
        dim=plain["hidden_size"],
        intermediate_size=plain["intermediate_size"],
        n_layers=plain["num_hidden_layers"],
        n_heads=plain["num_attention_heads"],
        n_kv_heads=plain["num_key_value_heads"],
        vocab_size=plain["vocab_size"],
        norm_eps=plain["rms_norm_eps"],
        rope_theta=plain["rope_theta"],
        max_seq_len=plain["max_position_embeddings"],
    )
    model = LlamaTransformer(config)
    _take_weights(model, _weights(folder))
    model.train()
    optimizer = model.configure_optimizers(
        weight_decay=work.weight_decay,
        learning_rate=work.learning_rates[0],
        device_type="cpu",
        master_process=False,
    )
    dtype = getattr(torch, work.precision)

    def summed_nats(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _, loss = model(ids, targets)
        return loss * targets.numel()

    return plain_update(
        summed_nats,
        model=model,
        optimizer=optimizer,
        microbatch_rows=work.microbatch_rows,
        clip_grad_norm=work.clip_grad_norm,
    )


def _transformers(work: Work, *, folder: Path) -> torch.nn.Module:
    import transformers

    config = transformers.LlamaConfig(**work.model)
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config)
    _take_weights(model, _weights(folder))
    model.train()
    return model


def _nats_of(model: torch.nn.Module, *, work: Work) -> SummedNats:
    return nats_of_logits(
        lambda ids: model(ids, use_cache=False).logits,
        device=_CPU,
        dtype=getattr(torch, work.precision),
    )


def _update(nats: SummedNats, *, model: torch.nn.Module, work: Work) -> Update:
    """With fused AdamW, which decays matrices only."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": work.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=work.learning_rates[0], betas=tuple(work.betas), eps=work.eps, fused=True
    )
    return plain_update(
        nats,
        model=model,
        optimizer=optimizer,
        microbatch_rows=work.microbatch_rows,
        clip_grad_norm=work.clip_grad_norm,
    )


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(weights_file(folder))


def _take_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies by name; what a model computes by itself has no name in the file."""
    left, unknown = model.load_state_dict(weights, strict=False)
    names = {name for name, _ in model.named_parameters()}
    assert not unknown and not names.intersection(left), (left, unknown)


def _under_litgpt_names(
    weights: Mapping[str, torch.Tensor], *, num_columns: int
) -> dict[str, torch.Tensor]:
    """litgpt's names, queries, keys and values in one matrix; rows beyond the vocabulary are 0."""
    renamed = {"transformer.ln_f.weight": weights["model.norm.weight"]}
    for theirs, name in (
        ("transformer.wte", "model.embed_tokens"),
        ("lm_head", "lm_head"),
    ):
        own = weights[f"{name}.weight"]
        padding = own.new_zeros(num_columns - len(own), own.shape[1])
        renamed[f"{theirs}.weight"] = torch.cat([own, padding])
    layer_names = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    num_layers = sum(name.endswith("input_layernorm.weight") for name in weights)
    for layer in range(num_layers):
        source, target = f"model.layers.{layer}", f"transformer.h.{layer}"
        for theirs, name in layer_names.items():
            renamed[f"{target}.{theirs}.weight"] = weights[f"{source}.{name}.weight"]
        parts = [weights[f"{source}.self_attn.{part}_proj.weight"] for part in "qkv"]
        renamed[f"{target}.attn.qkv.weight"] = torch.cat(parts)
    return renamed
