"""Initial weights, as the paper's script leaves them to transformers' default.

Each parameter has a generator of its own, seeded by the run's seed and the parameter's name:
its values depend on nothing else, not on the device and not on what was drawn before.
"""

from __future__ import annotations

import math

import torch

from milepost.config.schema import ModelSection
from milepost.core.seeds import derive_seed
from milepost.model.llama import Llama

_RESIDUAL_PROJECTIONS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@torch.no_grad()
def initialize(model: Llama, *, config: ModelSection, seed: int) -> None:
    """Fills every parameter in place: normal(0, initializer_range), norms 1.

    With `residual_init = "depth_scaled"` the projections into the residual stream have
    std / sqrt(2 layers) (Radford et al. 2019, section 2.3).

    Args:
        model: on any device; values are drawn on the CPU.
        config: the model's own section.
        seed: of the run.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
        is_in_place = parameter.device.type == "cpu" and parameter.dtype == torch.float32
        # A table of the vocabulary drawn beside its place leaves a hole of its size in the heap.
        values = parameter
        if not is_in_place:
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        values.normal_(0.0, _standard_deviation(name, config), generator=generator)
        if not is_in_place:
            parameter.copy_(values)


def _standard_deviation(name: str, config: ModelSection) -> float:
    if config.residual_init == "depth_scaled" and name.endswith(_RESIDUAL_PROJECTIONS):
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range
