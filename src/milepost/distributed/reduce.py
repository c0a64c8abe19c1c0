"""Sums across ranks that give the same bits for any number of ranks.

Gradients cross in a fixed tree: at each level a rank adds its partner's buffer to its own, and
an addition of two terms does not depend on their order. Losses are gathered and added on the
host in row order.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from milepost.core.console import say
from milepost.core.errors import MilepostError
from milepost.core.stacks import stack_lines
from milepost.core.units import format_duration
from milepost.distributed.world import JOIN_SECONDS, World


def sum_over_ranks(buffer: torch.Tensor, *, world: World) -> None:
    """Adds the buffers of all ranks, in place, in a binary tree; every rank must call.

    Ranks must be a power of two; every rank ends with the same bits.
    """
    with _given_up_in_time("a sum over ranks", world=world, seconds=world.timeout_seconds):
        for group in world.pair_groups:
            dist.all_reduce(buffer, op=dist.ReduceOp.SUM, group=group)


def gather_in_rank_order(values: torch.Tensor, *, world: World) -> torch.Tensor:
    """[K] on each rank to [size, K] on every rank; every rank must call."""
    if world.size == 1:
        return values.unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(world.size)]
    seconds = world.timeout_seconds
    with _given_up_in_time("a gathering from all ranks", world=world, seconds=seconds):
        dist.all_gather(gathered, values, group=world.all_ranks)
    return torch.stack(gathered)


def broadcast_json(value: Any, *, world: World) -> Any:
    """Rank 0's JSON value on every rank; every rank must call, the others' value is ignored.

    It waits for rank 0 as long as joining does.
    """
    if world.size == 1:
        return value
    data = json.dumps(value).encode() if world.is_main else b""
    length = torch.tensor([len(data)], dtype=torch.int64, device=world.device)
    with _given_up_in_time("a word from the main rank", world=world, seconds=JOIN_SECONDS):
        dist.broadcast(length, src=0)
        if world.is_main:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(world.device)
        else:
            content = torch.empty(int(length.item()), dtype=torch.uint8, device=world.device)
        dist.broadcast(content, src=0)
    return json.loads(bytes(content.cpu().numpy().tobytes()))


@contextlib.contextmanager
def _given_up_in_time(what: str, *, world: World, seconds: float) -> Iterator[None]:
    """Says who waited for whom, and from where, when gloo has waited long enough in the block."""
    try:
        yield
    except RuntimeError as error:
        if "timed out waiting" not in str(error).lower():
            raise
        say(f"rank {world.rank} stood here:")
        for line in stack_lines(None, without=__file__):
            say(line)
        world.mark_stalled()
        raise MilepostError(
            f"rank {world.rank} waited {format_duration(seconds)} for another rank "
            f"in {what} and gave up",
            hint="a rank is frozen or far behind; run the same command again, it goes on from the "
            "newest checkpoint. Where a wait may be so long (an evaluation on the main rank, a "
            "slow disk), raise guards.collective_timeout_seconds",
        ) from error
