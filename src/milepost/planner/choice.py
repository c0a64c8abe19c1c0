"""What memory decides where a recipe says "auto": recomputed blocks, and rows that may be tried."""

from __future__ import annotations

from milepost.config.schema import Config
from milepost.planner.memory import DeviceKind, estimate_memory, largest_microbatch_rows

FORWARD_TOKENS = 4096
"""A forward pass of so many tokens keeps the devices we know busy; with both fields "auto", blocks
are recomputed until one fits."""


def choose_recompute(
    config: Config, *, ranks: int, memory_bytes: int, device: DeviceKind = "gpu"
) -> str | int:
    """The fewest blocks to be computed again with which a rank fits its memory.

    Args:
        config: with any `train.recompute`; where the microbatch is "auto", one of
            `FORWARD_TOKENS` must fit.
        ranks: processes that share the lanes.
        memory_bytes: of one rank.
        device: what is trained on.

    Returns:
        A value of `train.recompute`; "block" also where not even that fits.
    """
    rows, num_blocks = _planned_rows(config), config.model.num_hidden_layers
    for num_recomputed in range(num_blocks):
        recompute = num_recomputed or "none"
        changed = _with_train(config, microbatch_rows=rows, recompute=recompute)
        needed = estimate_memory(changed, ranks=ranks, device=device)
        if needed.total_bytes <= memory_bytes:
            return recompute
    return "block"


def rows_to_try(
    config: Config, *, ranks: int, memory_bytes: int, device: DeviceKind = "gpu"
) -> list[int]:
    """Powers of two that deal a lane out evenly and fit the memory, ascending; 1 at least.

    Args:
        config: with `train.recompute` resolved.
        ranks: processes that share the lanes.
        memory_bytes: of one rank.
        device: what is trained on.
    """
    most = largest_microbatch_rows(config, ranks=ranks, memory_bytes=memory_bytes, device=device)
    return [rows for rows in _even_rows(config) if rows <= (most or 1)]


def settle(config: Config, *, ranks: int, memory_bytes: int | None) -> Config:
    """The config a plan is made of: no "auto" in what memory decides.

    Args:
        ranks: processes that share the lanes.
        memory_bytes: of one rank. None: it is not known and all fits it.

    Returns:
        With the most rows that a run would try, or, where the memory is not known, the rows of
        a forward pass of `FORWARD_TOKENS`.
    """
    train = config.train
    recompute: str | int = "none"
    if train.recompute != "auto":
        recompute = train.recompute
    elif memory_bytes is not None:
        recompute = choose_recompute(config, ranks=ranks, memory_bytes=memory_bytes)
    config = _with_train(config, recompute=recompute)
    rows = _planned_rows(config)
    if train.microbatch_rows == "auto" and memory_bytes is not None:
        rows = rows_to_try(config, ranks=ranks, memory_bytes=memory_bytes)[-1]
    return _with_train(config, microbatch_rows=rows)


def _planned_rows(config: Config) -> int:
    rows = config.train.microbatch_rows
    if rows != "auto":
        return rows
    wanted = max(1, FORWARD_TOKENS // config.data.sequence_length)
    return max(rows for rows in _even_rows(config) if rows <= wanted)


def _even_rows(config: Config) -> list[int]:
    """Powers of two that divide the rows of a lane, ascending."""
    rows_per_lane = config.rows_per_step // config.train.lanes
    return [2**n for n in range(rows_per_lane.bit_length()) if rows_per_lane % 2**n == 0]


def _with_train(config: Config, **changes: str | int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
