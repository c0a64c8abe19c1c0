"""What a segment may promise: the same bits as before, or the reason why not."""

from __future__ import annotations

import platform
from typing import Any

import torch

from milepost.config.schema import Config
from milepost.core.environment import cpu_name
from milepost.distributed.world import World
from milepost.runs.events import History

_MUST_MATCH = ("device", "torch", "cuda")


def machine_facts(*, device: torch.device) -> dict[str, Any]:
    """What the last bits of a run depend on besides its config."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if is_gpu else None,
    }


def judge_exactness(
    *, config: Config, world: World, history: History, restored_step: int | None
) -> tuple[str, str]:
    """("exact" or "approximate", the reason in words)."""
    if not config.train.deterministic:
        return "approximate", "train.deterministic is off"
    if world.device.type == "cpu" and torch.get_num_threads() != 1:
        return "approximate", f"{torch.get_num_threads()} threads a rank; one is exact"
    before = list(history.of_kind("segment_started"))
    if restored_step is not None and before:
        now = machine_facts(device=world.device)
        then = before[-1].get("versions", {})
        changed = [n for n in _MUST_MATCH if then.get(n) != now[n]]
        if changed:
            what = ", ".join(f"{n} was {then.get(n)} and is {now[n]}" for n in changed)
            return "approximate", what
    return "exact", "deterministic kernels, fixed order of sums"
