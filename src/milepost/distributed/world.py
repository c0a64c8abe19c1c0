"""The processes of a run as each of them sees it, and the process group between them."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from milepost.core.errors import MilepostError, UsageError
from milepost.distributed.devices import count_gpus
from milepost.distributed.place import Place, end_with_pipe
from milepost.distributed.stacks import answer_with_stack, ask_for_stacks

JOIN_SECONDS = 3600.0
"""How long a rank waits for the main rank to check data and checkpoints, before training."""


@dataclass(frozen=True)
class World:
    """One process among `size`.

    Attributes:
        pair_groups: group k holds this rank and the one 2^k away.
        all_ranks: the group of a training's collectives; None for one rank.
        timeout_seconds: how long those wait for another rank.
        stalled_mark: see `mark_stalled`; None where nobody looks for it.
    """

    rank: int
    size: int
    device: torch.device
    pair_groups: tuple[dist.ProcessGroup, ...] = ()
    all_ranks: dist.ProcessGroup | None = None
    timeout_seconds: float = JOIN_SECONDS
    stalled_mark: Path | None = None

    def mark_stalled(self) -> None:
        """Tells our launcher that this rank has given up, and lets it show where the others stand
        before they notice.
        """
        if self.stalled_mark is not None:
            ask_for_stacks(self.stalled_mark, rank=self.rank)

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes and prints."""
        return self.rank == 0


@contextlib.contextmanager
def join_world(place: Place, *, device_type: str, timeout_seconds: float) -> Iterator[World]:
    """The world of this process for the block; every rank must enter it.

    Args:
        place: from the command line's environment.
        device_type: "cpu" (gloo, one thread a rank) or "cuda" (nccl).
        timeout_seconds: how long a collective of the training may wait. Joining may take
            longer: the main rank comes to it when it has checked the data.

    Raises:
        UsageError: there is no GPU for this process, or there are GPUs that torch cannot use.
        MilepostError: another rank is gone, or has kept this one waiting for too long (gloo; of
            nccl, torch's own watchdog ends the process then).
    """
    answer_with_stack()
    if device_type == "cuda":
        _check_gpu(place)
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    else:
        count_gpus()  # refuses those that torch cannot use: nobody asked for the CPU then
        device = torch.device("cpu")
    if place.size == 1:
        yield World(rank=0, size=1, device=device, stalled_mark=place.stalled_mark)
        return
    has_failed = True
    try:
        yield _join(place, device=device, timeout_seconds=timeout_seconds)
        has_failed = False
    except RuntimeError as error:
        if not _is_loss_of_a_peer(error):
            raise
        raise MilepostError(
            f"rank {place.rank} lost the other ranks", hint="what went wrong is said by another"
        ) from error
    finally:
        # Gloo's end tells the others at once. Nccl's waits for them, who may wait for this one:
        # a rank that fails leaves it to the end of its process.
        if dist.is_initialized() and not (has_failed and device.type == "cuda"):
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _join(place: Place, *, device: torch.device, timeout_seconds: float) -> World:
    """Meets the other ranks and makes the groups with them."""
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_meet(place),
            rank=place.rank,
            world_size=place.size,
            timeout=datetime.timedelta(seconds=JOIN_SECONDS),
        )
        timeout = datetime.timedelta(seconds=timeout_seconds)
        pair_groups = _pair_groups(place, timeout=timeout)
        all_ranks = pair_groups[0] if place.size == 2 else dist.new_group(timeout=timeout)
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in ("wait timeout", "timed out")):
            raise
        raise MilepostError(
            f"rank {place.rank} waited for another rank to join, in vain",
            hint="a rank is frozen or checks its data for too long; run the same command again",
        ) from error
    return World(
        rank=place.rank,
        size=place.size,
        device=device,
        pair_groups=pair_groups,
        all_ranks=all_ranks,
        timeout_seconds=timeout_seconds,
        stalled_mark=place.stalled_mark,
    )


def _meet(place: Place) -> dist.Store:
    """Where the ranks exchange their addresses: a file, or the store that torchrun keeps."""
    timeout = datetime.timedelta(seconds=JOIN_SECONDS)
    if place.rendezvous is not None:
        store = dist.FileStore(place.rendezvous, place.size)
    else:
        places = dist.rendezvous("env://", place.rank, place.size, timeout=timeout)
        # The store outlives the ranks: those that are started anew found the dead ones' addresses.
        store = dist.PrefixStore(f"start-{place.num_restarts}", next(places)[0])
    store.set_timeout(timeout)
    return store


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


def _pair_groups(place: Place, *, timeout: datetime.timedelta) -> tuple[dist.ProcessGroup, ...]:
    """Every rank makes every group, in one order, as torch demands; it keeps its own."""
    mine = []
    distance = 1
    while distance < place.size:
        for rank in range(place.size):
            partner = rank ^ distance
            if rank < partner < place.size:
                group = dist.new_group([rank, partner], timeout=timeout)
                if place.rank in (rank, partner):
                    mine.append(group)
        distance *= 2
    return tuple(mine)


def die_with_parent(place: Place) -> None:
    """Ends this process as soon as the launcher that started it is gone, however it died."""
    end_with_pipe(place.parent_pipe)
