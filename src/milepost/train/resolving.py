"""Every "auto" of a recipe, resolved once: when a run is made, by its main rank."""

from __future__ import annotations

from typing import Any

import torch

from milepost.config.schema import Config
from milepost.core.console import say
from milepost.core.environment import available_memory_bytes
from milepost.core.units import format_bytes
from milepost.evaluation.item_cache import user_cache_folder
from milepost.planner.choice import choose_recompute, rows_to_try
from milepost.planner.memory import DeviceKind
from milepost.train.float8 import check_float8
from milepost.train.microbatch import choose_rows
from milepost.train.precision import (
    check_compiler,
    make_deterministic,
    resolve_compile,
    resolve_precision,
)


def resolve_config(config: Config, *, device: torch.device, ranks: int) -> Config:
    """What a new run stores in place of every "auto".

    Args:
        config: as a person set it.
        device: of this rank; the other ranks' are taken to be alike.
        ranks: processes that share the lanes.

    Raises:
        UsageError: the lanes cannot be dealt to so many ranks, or it cannot be compiled or
            computed in float8 here.
        MilepostError: not even one row fits the memory.
    """
    train = config.train
    config = _with_train(
        config,
        precision=resolve_precision(train.precision, device=device),
        compile=resolve_compile(train.compile, config=config, device=device),
    )
    check_float8(config, device=device)
    if "auto" not in (train.microbatch_rows, train.recompute):
        return config
    memory_bytes = _bytes_of_a_rank(device, ranks=ranks)
    kind: DeviceKind = "gpu" if device.type == "cuda" else "cpu"
    if train.recompute == "auto":
        chosen = choose_recompute(config, ranks=ranks, memory_bytes=memory_bytes, device=kind)
        say(f"recompute: {chosen}, as planned for {format_bytes(memory_bytes)} a rank")
        config = _with_train(config, recompute=chosen)
    if train.microbatch_rows == "auto":
        check_compiler(config, device=device)
        if train.deterministic:  # as the run will be
            make_deterministic(device=device)
        rows = choose_rows(
            config,
            candidates=rows_to_try(config, ranks=ranks, memory_bytes=memory_bytes, device=kind),
            device=device,
            ranks=ranks,
            folder=user_cache_folder() / "microbatch",
        )
        config = _with_train(config, microbatch_rows=rows)
    return config


def _bytes_of_a_rank(device: torch.device, *, ranks: int) -> int:
    """Memory that is free for each rank: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = available_memory_bytes()
    if available is None:  # nobody knows: leave it to the timing
        return 2**63
    return available // ranks


def _with_train(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
