"""AdamW with decay on matrices only, and its moments by parameter name."""

from __future__ import annotations

import torch
from torch import nn

from milepost.config.schema import OptimizerSection
from milepost.core.errors import CheckpointError
from milepost.train.lowbit import (
    build_adamw8bit,
    code_bytes,
    code_tensors,
    decode,
    encode,
    is_coded,
    is_of_codes,
    take_codes,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, *, config: OptimizerSection) -> torch.optim.Optimizer:
    """Fused AdamW, or torchao's of 8 bits, of the parameters that are not frozen.

    Weight decay is on tensors of two or more dimensions (the authors' script).

    Raises:
        UsageError: the one of 8 bits is asked for and torchao is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.name == "adamw8bit":
        return build_adamw8bit(groups, config=config)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def moments_bytes(model: nn.Module, *, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all moments there will be, before the first update too."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            has_codes = _has_codes(parameter, optimizer=optimizer)
            size = code_bytes(parameter.numel()) if has_codes else 4 * parameter.numel()
            total += len(_MOMENTS) * size
    return total


def moments_by_name(
    model: nn.Module, *, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], int]:
    """("exp_avg.NAME" and "exp_avg_sq.NAME" to tensors, updates done); nothing is copied.

    A moment of 8 bits is three tensors, see `lowbit.code_tensors`.
    """
    moments: dict[str, torch.Tensor] = {}
    num_updates = 0
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            num_updates = int(state["step"].item())
            for moment in _MOMENTS:
                if _has_codes(parameter, optimizer=optimizer):
                    moments |= code_tensors(state[moment], moment=moment, name=name)
                else:
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

    Where a run goes on with the other of the two optimizers, on purpose, float32 moments are
    coded in 8 bits, and those of 8 bits become float32 again.

    Raises:
        CheckpointError: a moment is missing, left over or of another shape.
    """
    left = dict(moments)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # torchao counts on the host.
        place = "cpu" if _is_lowbit(optimizer) else parameter.device
        state: dict[str, torch.Tensor] = {"step": torch.tensor(float(num_updates), device=place)}
        for moment in _MOMENTS:
            tensor = _take(left, moment=moment, name=name, parameter=parameter)
            if tensor is None:
                raise CheckpointError(f"the train state has no fitting {moment} of {name}")
            if _has_codes(parameter, optimizer=optimizer) != is_of_codes(tensor):
                tensor = decode(tensor) if is_of_codes(tensor) else encode(tensor, moment=moment)
            state[moment] = tensor
        optimizer.state[parameter] = state
    if left:
        raise CheckpointError(f"the train state has moments of unknown tensors: {sorted(left)[:3]}")


def _take(
    left: dict[str, torch.Tensor], *, moment: str, name: str, parameter: torch.Tensor
) -> torch.Tensor | None:
    """A saved moment as a copy on the parameter's device; None where there is none that fits."""
    if f"{moment}.{name}" not in left:
        return take_codes(left, moment=moment, name=name, parameter=parameter)
    found = left.pop(f"{moment}.{name}")
    if found.shape != parameter.shape:
        return None
    return found.to(parameter.device, torch.float32, copy=True)


def _is_lowbit(optimizer: torch.optim.Optimizer) -> bool:
    return not isinstance(optimizer, torch.optim.AdamW)


def _has_codes(parameter: nn.Parameter, *, optimizer: torch.optim.Optimizer) -> bool:
    return _is_lowbit(optimizer) and is_coded(parameter.numel())
