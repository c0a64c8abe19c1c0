"""LoRA (Hu et al. 2021): low-rank additions to the projections of frozen blocks.

A projection becomes x W^T + alpha / rank * x A^T B^T. W is frozen, A and B are float32 masters
and computed in the dtype of x, as all weights are. In a state they have the names PEFT gives
them. Nothing here knows of files: adapter folders are read and written by
`inference.adapter_files`, whose `load_lora` puts one on a model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milepost.config.schema import LoraTarget
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.seeds import derive_seed
from milepost.model.layers import Embedding, Linear
from milepost.model.llama import Llama

LORA_TARGETS: tuple[str, ...] = get_args(LoraTarget)
"""The projections of a block, all of which can have additions."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the base's own parameter names."""


@dataclass(frozen=True)
class LoraShape:
    """What the additions of a model are.

    Attributes:
        rank: rows of A, columns of B.
        alpha: the additions are scaled by alpha / rank.
        targets: the projections that have them, in the order of `LORA_TARGETS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


class FrozenEmbedding(Embedding):
    """An embedding whose rows want a gradient though its table does not.

    So the first block's input wants one, as every later block's does: the blocks share one
    compiled graph, and a block without that gradient would be another.

    Args:
        weight: [V, D], taken as it is.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows.requires_grad_() if torch.is_grad_enabled() else rows


class LoraLinear(Linear):
    """A frozen projection with its addition.

    Args:
        weight: [out, in] of the projection, taken as it is.
        rank: of the addition.
        alpha: see `LoraShape`.
    """

    def __init__(self, weight: nn.Parameter, *, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        out_features, in_features = weight.shape
        self.weight = weight
        with torch.device(weight.device):
            self.lora_A = Linear(in_features, rank)
            self.lora_B = Linear(rank, out_features)
        self.rank, self.alpha = rank, alpha

    @property
    def scaling(self) -> float:
        """The factor of the addition."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        addition = self.lora_B(self.lora_A(x)) * self.scaling
        return F.linear(x, self.weight.to(x.dtype)) + addition

    def addition(self) -> Tensor:
        """[out, in] float32: what the addition does to the weight."""
        return (self.lora_B.weight @ self.lora_A.weight) * self.scaling


def add_lora(
    model: Llama, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int
) -> None:
    """Freezes a model and gives its projections additions, in place; what it computes stays equal.

    A is uniform in +-1 / sqrt(in), PEFT's default; B is zero. Each A has a generator of its own,
    seeded by `seed` and its name. On `meta` nothing is filled.

    Args:
        model: without additions, on any device; A is drawn on the CPU.
        rank: at least 1.
        alpha: above 0.
        dropout: must be 0, see below.
        targets: some of `LORA_TARGETS`.
        seed: of the run.

    Raises:
        UsageError: dropout is not 0.
    """
    assert not has_lora(model), "the model has additions already"
    assert rank >= 1 and alpha > 0 and targets and set(targets) <= set(LORA_TARGETS)
    if dropout != 0:
        raise UsageError(
            f"lora.dropout is {dropout:g}, only 0 can be trained",
            hint="dropout draws random numbers whose state no checkpoint holds, so a run with it "
            "could not be continued exactly; the paper used 0",
        )
    model.requires_grad_(False)
    for name, parent, target in _projections(model, targets):
        layer = LoraLinear(getattr(parent, target).weight, rank=rank, alpha=alpha)
        setattr(parent, target, layer)
        if not layer.weight.is_meta:
            _initialize(layer, seed=seed, name=name)
    model.model.embed_tokens = FrozenEmbedding(model.model.embed_tokens.weight)


def _projections(model: Llama, targets: Sequence[str]) -> list[tuple[str, nn.Module, str]]:
    """(full name, the module that holds it, its name there) of every target, in order."""
    return [
        (f"{path}.{target}", parent, target)
        for path, parent in model.named_modules()
        for target in LORA_TARGETS
        if target in targets and isinstance(getattr(parent, target, None), Linear)
    ]


@torch.no_grad()
def _initialize(layer: LoraLinear, *, seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora", name))
    weight = layer.lora_A.weight
    values = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    bound = 1 / math.sqrt(weight.shape[1])
    weight.copy_(values.uniform_(-bound, bound, generator=generator))
    layer.lora_B.weight.zero_()


def lora_layers(model: Llama) -> Iterator[tuple[str, LoraLinear]]:
    """The projections with additions, by name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def has_lora(model: Llama) -> bool:
    """Whether a model has additions."""
    return next(lora_layers(model), None) is not None


def lora_shape(model: Llama) -> LoraShape:
    """What the additions of a model are; it must have some."""
    layers = dict(lora_layers(model))
    assert layers, "the model has no additions"
    first = next(iter(layers.values()))
    names = {name.rpartition(".")[2] for name in layers}
    return LoraShape(first.rank, first.alpha, tuple(t for t in LORA_TARGETS if t in names))


@torch.no_grad()
def merge_lora(model: Llama) -> None:
    """Adds the additions into the weights in float32, in place: a plain model is left."""
    for name, layer in list(lora_layers(model)):
        out_features, in_features = layer.weight.shape
        with torch.device("meta"):  # the weight itself takes the place of the empty one
            plain = Linear(in_features, out_features)
        layer.weight.add_(layer.addition())
        plain.weight = layer.weight
        model.set_submodule(name, plain)
    with torch.device("meta"):
        table = Embedding(*model.model.embed_tokens.weight.shape)
    table.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = table
    model.requires_grad_(True)


def lora_state(model: Llama) -> dict[str, Tensor]:
    """A and B of every projection, float32, under PEFT's names; nothing is copied."""
    return {
        f"{PEFT_PREFIX}{name}.{part}.weight": getattr(layer, part).weight.detach()
        for name, layer in lora_layers(model)
        for part in ("lora_A", "lora_B")
    }


@torch.no_grad()
def set_lora_state(model: Llama, state: dict[str, Tensor]) -> None:
    """Copies A and B into a model that has additions of the same shape.

    Args:
        model: as `add_lora` left it.
        state: as `lora_state` gives it, any float dtype and device.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; nothing was copied.
    """
    own = lora_state(model)
    for names, what in ((set(own) - set(state), "lacks"), (set(state) - set(own), "has unknown")):
        if names:
            raise CheckpointError(f"the adapter {what} {min(names)}")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"the adapter's {name} has shape {list(state[name].shape)}, "
                f"the model needs {list(tensor.shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def base_sha256(model: Llama) -> str:
    """The hash that names the base of an adapter: of its weights' float32 values, by name.

    Whichever files they came from; additions do not count. On a GPU the weights are copied to
    the host one by one.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            continue
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        values = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(memoryview(values.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
