"""The processes of a run as each of them sees it, and the process group between them."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from milepost.core.errors import MilepostError, UsageError
from milepost.distributed.devices import count_gpus
from milepost.distributed.place import Place, end_with_pipe

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """One process among `size`; `pair_groups[k]` holds this rank and the one 2^k away."""

    rank: int
    size: int
    device: torch.device
    pair_groups: tuple[dist.ProcessGroup, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes and prints."""
        return self.rank == 0


@contextlib.contextmanager
def join_world(place: Place, *, device_type: str) -> Iterator[World]:
    """The world of this process for the block; every rank must enter it.

    Args:
        place: from the command line's environment.
        device_type: "cpu" (gloo, one thread a rank) or "cuda" (nccl).

    Raises:
        UsageError: there is no GPU for this process, or there are GPUs that torch cannot use.
        MilepostError: another rank is gone.
    """
    if device_type == "cuda":
        _check_gpu(place)
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    else:
        count_gpus()  # refuses those that torch cannot use: nobody asked for the CPU then
        device = torch.device("cpu")
    if place.size == 1:
        yield World(rank=0, size=1, device=device)
        return
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{place.rendezvous}" if place.rendezvous else "env://",
        rank=place.rank,
        world_size=place.size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield World(
            rank=place.rank, size=place.size, device=device, pair_groups=_pair_groups(place)
        )
    except RuntimeError as error:
        if not _is_loss_of_a_peer(error):
            raise
        raise MilepostError(
            f"rank {place.rank} lost the other ranks", hint="what went wrong is said by another"
        ) from error
    finally:
        # A rank that fails must not wait for the others here.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _check_gpu(place: Place) -> None:
    num_gpus = torch.cuda.device_count()
    if place.local_rank >= num_gpus:
        raise UsageError(
            f"rank {place.rank} needs GPU {place.local_rank}, this machine has {num_gpus}",
            hint=f"start at most {num_gpus} processes a machine (torchrun --nproc-per-node)",
        )


def _is_loss_of_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return any(words in str(error).lower() for words in _WORDS_OF_A_LOST_PEER)


_WORDS_OF_A_LOST_PEER = (
    "connection closed by peer",
    "connection closed by remote peer",
    "connection reset by peer",
    "broken pipe",
    "remote process exited",
)
"""Gloo's, the rendezvous store's and NCCL's."""


def _pair_groups(place: Place) -> tuple[dist.ProcessGroup, ...]:
    """Every rank makes every group, in one order, as torch demands; it keeps its own."""
    mine = []
    distance = 1
    while distance < place.size:
        for rank in range(place.size):
            partner = rank ^ distance
            if rank < partner:
                group = dist.new_group([rank, partner])
                if place.rank in (rank, partner):
                    mine.append(group)
        distance *= 2
    return tuple(mine)


def die_with_parent(place: Place) -> None:
    """Ends this process as soon as the launcher that started it is gone, however it died."""
    end_with_pipe(place.parent_pipe)
