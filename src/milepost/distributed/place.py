"""What the environment says about this process among its like, without importing torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from milepost.core.errors import UsageError

RENDEZVOUS_VARIABLE = "MILEPOST_RENDEZVOUS"
PARENT_PIPE_VARIABLE = "MILEPOST_PARENT_PIPE"
SAVING_MARK = "saving"
"""A file beside the rendezvous that is there while a save is under way."""

STALLED_MARK = "stalled"
"""Begins the names of files beside the rendezvous; a rank that has given up waiting makes one."""


@dataclass(frozen=True)
class Place:
    """One rank's place.

    Attributes:
        rank: 0 to size - 1.
        local_rank: the rank on this machine, which is the number of its GPU.
        started_by: "milepost" (our launcher) or "torchrun".
        rendezvous: the file at which our ranks meet; None under torchrun.
        parent_pipe: a descriptor that ends when our launcher does; None under torchrun.
        num_restarts: how often torchrun has started its ranks anew.
    """

    rank: int
    size: int
    local_rank: int
    started_by: Literal["milepost", "torchrun"]
    rendezvous: str | None = None
    parent_pipe: int | None = None
    num_restarts: int = 0

    @property
    def saving_mark(self) -> Path | None:
        """What tells our launcher to wait for a save; None under torchrun, which does not ask."""
        return None if self.rendezvous is None else Path(self.rendezvous).with_name(SAVING_MARK)

    @property
    def stalled_mark(self) -> Path | None:
        """What tells our launcher to show where the other ranks stand; None under torchrun."""
        return None if self.rendezvous is None else Path(self.rendezvous).with_name(STALLED_MARK)


def read_place(environment: Mapping[str, str]) -> Place | None:
    """This process's place, or None where nobody has given it one.

    Raises:
        UsageError: the launcher's variables are not numbers.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        num_restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
    except ValueError as error:
        raise UsageError(
            f"RANK, WORLD_SIZE, LOCAL_RANK and TORCHELASTIC_RESTART_COUNT must be numbers: {error}",
            hint="unset them, or start with torchrun or milepost train",
        ) from error
    rendezvous = environment.get(RENDEZVOUS_VARIABLE)
    return Place(
        rank=rank,
        size=size,
        local_rank=local_rank,
        started_by="milepost" if rendezvous else "torchrun",
        rendezvous=rendezvous,
        parent_pipe=read_parent_pipe(environment),
        num_restarts=num_restarts,
    )


def read_parent_pipe(environment: Mapping[str, str]) -> int | None:
    """The descriptor that ends when the process that started this one does, where there is one.

    Raises:
        UsageError: the variable is no number.
    """
    pipe = environment.get(PARENT_PIPE_VARIABLE)
    try:
        return None if pipe is None else int(pipe)
    except ValueError as error:
        raise UsageError(
            f"{PARENT_PIPE_VARIABLE} must be a number: {error}", hint="unset it"
        ) from error


def end_with_pipe(descriptor: int | None) -> None:
    """Ends this process as soon as nobody holds the pipe's other end; nothing for None."""
    if descriptor is None:
        return

    def wait_for_the_end() -> None:
        os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=wait_for_the_end, name="parent-watch", daemon=True).start()
