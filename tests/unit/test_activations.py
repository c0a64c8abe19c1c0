"""The planner's count of saved activations, held against what autograd saves."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.model.attention import mask_inside
from milepost.model.llama import Llama, run_block
from milepost.model.lora import add_lora
from milepost.planner.activations import block_bytes_per_token, block_casts_bytes
from milepost.train.precision import DTYPES

ROWS, LENGTH = 4, 64


def _config(*overrides: str) -> Config:
    shape = ("--model.num_attention_heads", "4", "--model.num_key_value_heads", "2")
    sizes = ("--data.sequence_length", str(LENGTH), "--train.microbatch_rows", str(ROWS))
    return load_recipe("demo", overrides=(*shape, *sizes, *overrides))


def _saved_bytes(config: Config) -> int:
    """What the first block saves, each storage once, without weights and tables."""
    model = Llama(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    lora = config.lora
    if lora.rank is not None:
        add_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=0.0, targets=lora.targets, seed=1)
    block, width = model.model.layers[0], config.model.hidden_size
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *model.buffers())}
    runner = run_block
    if config.train.compile is True:
        runner = torch.compile(run_block, dynamic=False, fullgraph=True)
    hidden = torch.randn(ROWS, LENGTH, width).to(DTYPES[config.train.precision]).requires_grad_()
    mask = None
    if config.data.document_attention:
        mask = mask_inside((torch.arange(LENGTH) // 10).expand(ROWS, LENGTH))
        known.add(mask.untyped_storage().data_ptr())
    cos, sin = model.model.cos[:LENGTH], model.model.sin[:LENGTH]
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = runner(block, hidden, cos, sin, mask)
    assert result.requires_grad
    return sum(size for place, size in saved.items() if place not in known)


def _planned_bytes(config: Config) -> int:
    per_token = block_bytes_per_token(config, on_cpu=True)
    return ROWS * LENGTH * per_token + block_casts_bytes(config)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_plan_counts_what_a_block_saves(precision: str, masked: bool) -> None:
    mask = "--data.document_attention" if masked else "--data.no-document_attention"
    config = _config("--train.precision", precision, "--train.compile", "false", mask)
    assert _saved_bytes(config) == _planned_bytes(config)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_plan_counts_what_a_compiled_block_saves(precision: str) -> None:
    config = _config("--train.precision", precision, "--train.compile", "true")
    torch._dynamo.reset()
    try:
        assert _saved_bytes(config) == _planned_bytes(config)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_plan_counts_what_a_block_with_lora_saves(precision: str) -> None:
    words = ("--lora.rank", "8", "--finetune.template", "vicuna-1.1", "--data.document_attention")
    config = _config(*words, "--train.precision", precision, "--train.compile", "false")
    assert _saved_bytes(config) == _planned_bytes(config)
