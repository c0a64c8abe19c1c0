"""Logits, loss and gradients against transformers.LlamaForCausalLM with the same weights.

float32 must agree to rounding. In bfloat16 two right programs differ by as much as each differs
from float32, so both distances are given: ours must not be the larger by much. Gradients of
transformers are taken under autocast, whose residual stream is float32; ours is bfloat16.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F

from milepost.config.schema import Config
from milepost.model.huggingface import hf_config
from milepost.model.llama import Llama
from milepost.model.loss import training_loss
from milepost.train.objective import LOSS_CHUNK_ROWS
from on_gpu.setting import Setting, new_model, open_setting, show_row

QUESTION = "are logits, loss and gradients those of transformers?"
RECIPE = "dmas-1.7b"
STEPS = 0
GRADIENT_LAYERS = 2
"""Layers of the full-width model whose gradients are compared; two copies must fit."""

Loss = tuple[float, dict[str, torch.Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing besides the shared arguments."""


def answer(arguments: argparse.Namespace) -> int:
    """Two rows: logits of the whole model, loss and gradients of its first layers."""
    setting = open_setting(arguments)
    _compare_logits(setting)
    _compare_gradients(setting)
    return 0


def oracle_of(model: Llama, *, end_of_text_id: int) -> torch.nn.Module:
    """transformers' model with the same weights on the same device, SDPA attention."""
    import transformers

    plain = hf_config(model.config, end_of_text_id=end_of_text_id, dtype="float32")
    config = transformers.LlamaConfig(**plain)
    config._attn_implementation = "sdpa"
    with model.head_weight.device:
        oracle = transformers.LlamaForCausalLM(config)
    oracle.load_state_dict(model.state_dict(), strict=False)
    oracle.tie_weights()
    return oracle


@torch.no_grad()
def _compare_logits(setting: Setting) -> None:
    model = new_model(setting.config, device=setting.device)
    oracle = oracle_of(model, end_of_text_id=0).eval()
    ids = _ids(setting.config, device=setting.device)[:, :-1]
    exact = oracle(ids, use_cache=False).logits
    wide = _distances(_logits(model, ids, torch.float32), exact)
    ours = _distances(_logits(model, ids, torch.bfloat16), exact)
    for parameter in oracle.parameters():  # not the rotary table, which stays float32 there too
        parameter.data = parameter.data.to(torch.bfloat16)
    theirs = _distances(oracle(ids, use_cache=False).logits, exact)
    show_row(
        "parity",
        setting=setting,
        part="logits",
        num_layers=setting.config.model.num_hidden_layers,
        largest_logit=float(exact.abs().max()),
        float32=wide,
        bfloat16_ours_to_float32=ours,
        bfloat16_transformers_to_float32=theirs,
    )


def _compare_gradients(setting: Setting) -> None:
    layers = min(GRADIENT_LAYERS, setting.config.model.num_hidden_layers)
    section = setting.config.model.model_copy(update={"num_hidden_layers": layers})
    config = setting.config.model_copy(update={"model": section})
    model = new_model(config, device=setting.device)
    oracle = oracle_of(model, end_of_text_id=0)
    ids = _ids(config, device=setting.device)
    exact = _loss_of_oracle(oracle, ids)
    wide = _loss_of_ours(model, ids, torch.float32)
    ours = _loss_of_ours(model, ids, torch.bfloat16)
    with torch.autocast(setting.device.type, torch.bfloat16):
        theirs = _loss_of_oracle(oracle, ids)
    show_row(
        "parity",
        setting=setting,
        part="loss and gradients",
        num_layers=layers,
        loss_nats=exact[0],
        float32=_loss_distances(wide, exact),
        bfloat16_ours_to_float32=_loss_distances(ours, exact),
        bfloat16_transformers_to_float32=_loss_distances(theirs, exact),
    )


def _ids(config: Config, *, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (1, config.data.sequence_length + 1)
    return torch.randint(0, config.model.vocab_size, shape, generator=generator).to(device)


def _logits(model: Llama, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.linear(model(ids, compute_dtype=dtype), model.head_weight.to(dtype))


def _loss_of_ours(model: Llama, ids: torch.Tensor, dtype: torch.dtype) -> Loss:
    model.zero_grad()
    targets = ids[:, 1:].flatten()
    loss, _ = training_loss(
        model(ids[:, :-1], compute_dtype=dtype).flatten(0, 1),
        model.head_weight,
        targets,
        scale=1 / targets.numel(),
        chunk_rows=LOSS_CHUNK_ROWS,
    )
    loss.backward()
    return loss.item(), _gradients(model)


def _loss_of_oracle(oracle: torch.nn.Module, ids: torch.Tensor) -> Loss:
    oracle.zero_grad()
    logits = oracle(ids[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), _gradients(oracle)


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _distances(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    apart = (found.float() - expected).abs()
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


def _loss_distances(found: Loss, expected: Loss) -> dict[str, Any]:
    """Of losses the difference; of gradients the largest relative L2 distance of a tensor."""
    apart = {
        name: float((found[1][name].float() - gradient).norm() / gradient.norm())
        for name, gradient in expected[1].items()
    }
    worst = max(apart, key=apart.__getitem__)
    return {
        "loss_nats": found[0] - expected[0],
        "gradient": apart[worst],
        "gradient_of": worst,
    }
