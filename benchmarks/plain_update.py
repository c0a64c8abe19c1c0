"""An update as most training scripts write it, for the peers: torch alone, nothing of Milepost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

SummedNats = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(ids [B, T], targets [B, T]) -> sum of nats, with a gradient."""

Update = Callable[[np.ndarray, float], float]
"""(global batch [rows, T + 1], learning rate) -> mean nats."""


def nats_of_logits(
    logits_of: Callable[[torch.Tensor], torch.Tensor], *, device: torch.device, dtype: torch.dtype
) -> SummedNats:
    """The loss of a model that gives logits, with autocast unless the dtype is float32."""

    def summed_nats(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = logits_of(ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    return summed_nats


def plain_update(
    summed_nats: SummedNats,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    microbatch_rows: int,
    clip_grad_norm: float | None,
) -> Update:
    """Accumulates over microbatches by autograd, clips with torch's function, steps."""
    device = next(model.parameters()).device

    def update(batch: np.ndarray, learning_rate: float) -> float:
        num_targets = batch.shape[0] * (batch.shape[1] - 1)
        optimizer.zero_grad(set_to_none=True)
        nats = torch.zeros((), device=device)
        for start in range(0, batch.shape[0], microbatch_rows):
            ids = torch.from_numpy(batch[start : start + microbatch_rows].astype(np.int64))
            if device.type == "cuda":
                ids = ids.pin_memory().to(device, non_blocking=True)
            loss = summed_nats(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            (loss / num_targets).backward()
            nats += loss.detach()
        if clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        return nats.item() / num_targets

    return update
