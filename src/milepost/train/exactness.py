"""What a segment may promise: the same bits as before, or the reason why not."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch

from milepost.config.schema import Config
from milepost.core.environment import code_version, cpu_name
from milepost.distributed.world import World
from milepost.runs.events import Event, History
from milepost.runs.overrides import Change

_MUST_MATCH = ("device", "torch", "cuda", "milepost")


def machine_facts(*, device: torch.device) -> dict[str, Any]:
    """What the last bits of a run depend on besides its config."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_gpu else None,
        "milepost": code_version(),
        "python": platform.python_version(),
    }


def device_names(*, world: World) -> list[str]:
    """The devices of all ranks of this machine; one entry for a CPU."""
    if world.device.type == "cuda":
        return [torch.cuda.get_device_name(rank) for rank in range(torch.cuda.device_count())][
            : world.size
        ]
    return [cpu_name()]


def judge_exactness(
    *,
    config: Config,
    world: World,
    history: History,
    restored_step: int | None,
    overrides: Sequence[Change],
) -> tuple[str, str]:
    """("exact" or "approximate", the reason in words).

    Args:
        config: of this segment.
        world: of this process.
        history: before this segment.
        restored_step: the checkpoint's step; None for a new start.
        overrides: changes of the recipe that this segment takes.
    """
    if not config.train.deterministic:
        return "approximate", "train.deterministic is off"
    if world.device.type == "cpu" and torch.get_num_threads() != 1:
        return "approximate", f"{torch.get_num_threads()} threads a rank; one is exact"
    if len(set(device_names(world=world))) > 1:
        return "approximate", f"different devices: {', '.join(device_names(world=world))}"
    if overrides:
        return "approximate", f"overridden: {', '.join(field for field, _, _ in overrides)}"
    now = machine_facts(device=world.device)
    for segment in _segments_behind(history, restored_step):
        then = segment.get("versions", {})
        changed = [name for name in _MUST_MATCH if then.get(name) != now[name]]
        if changed:
            what = ", ".join(f"{n} was {then.get(n)} and is {now[n]}" for n in changed)
            return "approximate", what
    return "exact", "deterministic kernels, fixed order of sums"


def _segments_behind(history: History, restored_step: int | None) -> list[Event]:
    """Starts of the segment that saved the restored checkpoint and of all after it."""
    saved = history.latest_by_step("checkpoint_saved").get(restored_step or 0)
    first = 1 if saved is None else saved["segment"]
    return [e for e in history.of_kind("segment_started") if e.get("segment", 0) >= first]
