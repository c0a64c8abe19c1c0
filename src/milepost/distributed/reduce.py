"""Sums across ranks that give the same bits for any number of ranks.

Gradients cross in a fixed tree: at each level a rank adds its partner's buffer to its own, and
an addition of two terms does not depend on their order. Losses are gathered and added on the
host in row order.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from milepost.distributed.world import World


def sum_over_ranks(buffer: torch.Tensor, *, world: World) -> None:
    """Adds the buffers of all ranks, in place, in a binary tree; every rank must call.

    Ranks must be a power of two; every rank ends with the same bits.
    """
    for group in world.pair_groups:
        dist.all_reduce(buffer, op=dist.ReduceOp.SUM, group=group)


def gather_in_rank_order(values: torch.Tensor, *, world: World) -> torch.Tensor:
    """[K] on each rank to [size, K] on every rank; every rank must call."""
    if world.size == 1:
        return values.unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


def broadcast_json(value: Any, *, world: World) -> Any:
    """Rank 0's JSON value on every rank; every rank must call, the others' value is ignored."""
    if world.size == 1:
        return value
    data = json.dumps(value).encode() if world.is_main else b""
    length = torch.tensor([len(data)], dtype=torch.int64, device=world.device)
    dist.broadcast(length, src=0)
    if world.is_main:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(world.device)
    else:
        content = torch.empty(int(length.item()), dtype=torch.uint8, device=world.device)
    dist.broadcast(content, src=0)
    return json.loads(bytes(content.cpu().numpy().tobytes()))
