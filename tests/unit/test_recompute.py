"""Recomputed blocks: which of them, and that the bits stay."""

from __future__ import annotations

import collections
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.model.lora import add_lora
from milepost.train.objective import build_objective
from tests.training import write_recipe

NUM_BLOCKS = 3
IDS = torch.arange(4 * 32).view(4, 32) * 7 % 512


def tiny(folder: Path, *words: str) -> Config:
    layers = ("--model.num_hidden_layers", str(NUM_BLOCKS))
    return load_recipe(str(write_recipe(folder)), overrides=(*layers, *words))


def make_model(config: Config) -> Llama:
    model = Llama(config.model)
    initialize(model, config=config.model, seed=1)
    if config.lora.rank is not None:
        add_lora(model, rank=2, alpha=4, dropout=0.0, targets=("q_proj", "down_proj"), seed=1)
    return model


def gradients(config: Config) -> dict[str, torch.Tensor]:
    model = make_model(config)
    loss, nats = build_objective(model, config=config, end_of_text_id=0)(IDS, IDS, 0.01)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach(), "nats": nats}


def assert_recomputing_keeps_the_bits(folder: Path, *words: str) -> None:
    expected = gradients(tiny(folder, *words))
    for recompute in ("1", "2", "3", "block"):
        found = gradients(tiny(folder, *words, "--train.recompute", recompute))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), f"{name}, recompute {recompute}"


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--train.precision", "bfloat16"),
        ("--train.precision", "float16"),
        ("--data.document_attention", "true"),
        ("--finetune.template", "vicuna-1.1", "--lora.rank", "2"),
    ],
)
def test_recomputing_some_blocks_keeps_every_bit(words: tuple[str, ...], tmp_path: Path) -> None:
    assert_recomputing_keeps_the_bits(tmp_path, *words)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputing_some_compiled_blocks_keeps_every_bit(precision: str, tmp_path: Path) -> None:
    words = ("--train.compile", "true", "--train.precision", precision)
    torch._dynamo.reset()
    try:
        assert_recomputing_keeps_the_bits(tmp_path, *words)
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()


@pytest.mark.parametrize(
    ("recompute", "passes"),
    [("none", [1, 1, 1]), ("1", [2, 1, 1]), ("2", [2, 2, 1]), ("3", [2] * 3), ("block", [2] * 3)],
)
def test_the_first_blocks_are_the_ones_that_are_computed_again(
    recompute: str, passes: list[int], tmp_path: Path
) -> None:
    config = tiny(tmp_path, "--train.recompute", recompute)
    model, counted = make_model(config), collections.Counter[int]()
    for number, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, number=number: counted.update([number]))
    build_objective(model, config=config, end_of_text_id=0)(IDS, IDS, 0.01)[0].backward()
    assert [counted[number] for number in range(NUM_BLOCKS)] == passes


def saved_bytes(config: Config) -> int:
    """Bytes that the forward pass leaves for the backward pass, weights apart."""
    model = make_model(config)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    objective = build_objective(model, config=config, end_of_text_id=0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(IDS, IDS, 0.01)
    return sum(found.values())


def test_each_recomputed_block_leaves_only_its_input(tmp_path: Path) -> None:
    kept = [saved_bytes(tiny(tmp_path, "--train.recompute", r)) for r in ("none", "1", "2", "3")]
    freed = [before - after for before, after in itertools.pairwise(kept)]
    assert min(freed) > 0
    assert max(freed) - min(freed) <= IDS.numel() * 32 * 4, "blocks are alike, but for an input"
