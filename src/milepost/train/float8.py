"""The products of the blocks' projections in float8, by torchao, scaled anew at every product.

Forward and backward; weights stay float32 masters, and all else has the run's compute dtype. The
training forward pass takes a block's copy that shares its parameters: the model itself, and so
validation, samples and checkpoints, knows nothing of float8.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from milepost.config.schema import Config, ModelSection
from milepost.core.errors import UsageError
from milepost.model.layers import Linear
from milepost.model.llama import Block, Llama, RunBlock
from milepost.model.lora import LoraLinear
from milepost.train.installed import quiet_torchao

_DIMENSION_MULTIPLE = 16
"""What the hardware's products want of every dimension."""

_FIRST_CAPABILITY = (8, 9)
"""Of the GPUs with float8 products: Ada and Hopper."""


def check_float8(config: Config, *, device: torch.device) -> None:
    """Refuses float8 where it cannot be.

    Args:
        config: resolved.
        device: of the run.

    Raises:
        UsageError: the GPU has no float8 products, the precision is not bfloat16, or no dimension
            of the model fits.
    """
    if config.train.float8 == "none":
        return
    what = f'train.float8 is "{config.train.float8}"'
    if config.train.precision != "bfloat16":
        raise UsageError(
            f"{what} and train.precision is {config.train.precision} here",
            hint="add --train.precision bfloat16, or --train.float8 none",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        found = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
        raise UsageError(
            f"{what} and {name} has no float8 products: compute capability {found}, 8.9 is needed",
            hint="--train.float8 none; for a run that was made with it also --override",
        )
    if count_products(config.model)[0] == 0:
        raise UsageError(
            f"{what} and no projection of the model has dimensions that are multiples of 16",
            hint="--train.float8 none, or another model.hidden_size",
        )


def float8_words(config: Config, *, device: torch.device) -> str:
    """What a run computes in float8, as it is told; it must compute something in it."""
    num, of = count_products(config.model)
    words = f"float8 {config.train.float8}: {num} of {of} products a block"
    if num < of:
        words += ", the others have dimensions that are no multiples of 16"
    if device.type != "cuda":
        words += "; emulated on a CPU, which is slow: for tests"
    return words


def count_products(config: ModelSection) -> tuple[int, int]:
    """(those that can be in float8, all) of one block."""
    with torch.device("meta"):
        block = Block(config)
    fits = [_fits(projection) for _, _, projection in _projections(block)]
    return sum(fits), len(fits)


def in_float8(run_block: RunBlock, *, model: Llama, kind: str) -> RunBlock:
    """Runs a block's copy with float8 products in its place.

    Args:
        run_block: what runs a block, compiled or not.
        model: on its device; its parameters are shared and must stay the same objects.
        kind: torchao's name of the scaling, "tensorwise" or "rowwise".
    """
    emulate = model.head_weight.device.type != "cuda"
    copies: dict[nn.Module, Block] = {
        block: _float8_copy(block, kind=kind, emulate=emulate)
        for block in model.model.layers
        if isinstance(block, Block)
    }

    def run(block: Block, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        return run_block(copies[block], hidden, cos, sin, mask)

    return run


class _WithAddition(nn.Module):
    """A LoRA projection whose frozen product is in float8; the addition is not."""

    def __init__(self, projection: LoraLinear, *, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        self.lora_A, self.lora_B = projection.lora_A, projection.lora_B
        self.scaling = projection.scaling

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.frozen(x)
        return product + self.lora_B(self.lora_A(x)) * self.scaling


def _float8_copy(block: Block, *, kind: str, emulate: bool) -> Block:
    with quiet_torchao():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    shared = {id(parameter): parameter for parameter in block.parameters()}
    copied = copy.deepcopy(block, shared)
    for parent, name, projection in list(_projections(copied)):
        if _fits(projection):
            plain = _plain(projection)
            is_lora = isinstance(projection, LoraLinear)
            setattr(parent, name, _WithAddition(projection, frozen=plain) if is_lora else plain)
    config = replace(Float8LinearConfig.from_recipe_name(kind), emulate=emulate)
    # Takes torch's own Linear only: the projections that fit, not those that are still ours.
    convert_to_float8_training(copied, config=config)
    return copied


def _projections(block: Block) -> Iterator[tuple[nn.Module, str, Linear]]:
    """(the module that holds it, its name there, itself)."""
    for parent in (block.self_attn, block.mlp):
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                yield parent, name, child


def _fits(projection: Linear) -> bool:
    return all(size % _DIMENSION_MULTIPLE == 0 for size in projection.weight.shape)


def _plain(projection: Linear) -> nn.Linear:
    out_features, in_features = projection.weight.shape
    with torch.device("meta"):  # the weight itself takes the place of the empty one
        plain = nn.Linear(in_features, out_features, bias=False)
    plain.weight = projection.weight
    return plain
