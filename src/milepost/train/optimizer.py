"""AdamW with decay on matrices only, and its moments by parameter name."""

from __future__ import annotations

import torch
from torch import nn

from milepost.config.schema import OptimizerSection
from milepost.core.errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, *, config: OptimizerSection) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on tensors of two or more dimensions (the authors' script)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for _, p in named if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def moments_by_name(
    model: nn.Module, *, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], int]:
    """("exp_avg.NAME" and "exp_avg_sq.NAME" to tensors, updates done); nothing is copied."""
    moments: dict[str, torch.Tensor] = {}
    num_updates = 0
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            num_updates = int(state["step"].item())
            for moment in _MOMENTS:
                moments[f"{moment}.{name}"] = state[moment]
    return moments, num_updates


def restore_moments(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    moments: dict[str, torch.Tensor],
    num_updates: int,
) -> None:
    """Puts saved moments back, in place of whatever the optimizer has.

    Raises:
        CheckpointError: a moment is missing, left over or of another shape.
    """
    left = dict(moments)
    for name, parameter in model.named_parameters():
        state: dict[str, torch.Tensor] = {
            "step": torch.tensor(float(num_updates), device=parameter.device)
        }
        for moment in _MOMENTS:
            tensor = left.pop(f"{moment}.{name}", None)
            if tensor is None or tensor.shape != parameter.shape:
                raise CheckpointError(f"the train state has no fitting {moment} of {name}")
            state[moment] = tensor.to(parameter.device, torch.float32, copy=True)
        optimizer.state[parameter] = state
    if left:
        raise CheckpointError(f"the train state has moments of unknown tensors: {sorted(left)[:3]}")
