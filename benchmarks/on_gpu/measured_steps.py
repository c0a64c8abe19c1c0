"""Seconds, rate and memory of updates, one that is not counted before them."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from milepost.config.schema import Config
from milepost.data.batch import Batches
from milepost.planner.memory import estimate_memory
from milepost.train.schedule import learning_rate
from milepost.train.step import Stepper
from on_gpu.setting import Setting, peak_share, tell, wait


def measure_steps(
    stepper: Stepper, batches: Batches, *, config: Config, steps: int, setting: Setting
) -> dict[str, Any]:
    """Runs `steps` + 1 updates; the first compiles and counts for nothing but itself.

    Returns:
        Fields of a row; the allocator's peaks where there is a GPU.
    """
    device = setting.device
    seconds, losses = [], []
    for step in range(steps + 1):
        batch = batches.batch(step)
        wait(device)
        started = time.perf_counter()
        result = stepper.run_step(
            batch, learning_rate=learning_rate(step, config=config), stop_requested=lambda: False
        )
        wait(device)
        seconds.append(time.perf_counter() - started)
        losses.append(result.loss_nats)
        tell(f"update {step}: {seconds[-1]:.3f} s, loss {result.loss_nats:.4f}")
    rate = config.train.global_batch_tokens / statistics.median(seconds[1:])
    measured: dict[str, Any] = {
        "fits": True,
        "first_step_seconds": seconds[0],
        "step_seconds": seconds[1:],
        "tokens_per_second": rate,
        "share_of_bf16_peak": peak_share(config, tokens_per_second=rate, device=device),
        "first_loss_nats": losses[0],
        "last_loss_nats": losses[-1],
    }
    if device.type == "cuda":
        measured["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        measured["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return measured


def planned_bytes(config: Config) -> int:
    """What `milepost plan` says of a rank's memory, without the process itself.

    The allocator does not see the process.
    """
    planned = estimate_memory(config)
    return planned.total_bytes - planned.process_bytes
