"""A new folder that appears whole or not at all, on a disk that has room for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from milepost.core.errors import StorageError, UsageError
from milepost.core.files import free_bytes, publish_folder, storage_errors
from milepost.core.units import format_bytes
from milepost.runs.steps import is_run

SPARE_BYTES = 4 << 20
"""Room for the small files and for the file system's own."""


def refuse_place(to: Path) -> None:
    """Refuses a place where a new folder would harm what is there, or could not appear.

    Args:
        to: the new folder, resolved; what it holds is not looked at.

    Raises:
        UsageError: it lies in a run, whose checkpoints would count as damaged with it; or it is
            the folder the person is in, or where a disk is mounted, which cannot be replaced.
        StorageError: it cannot be looked at.
    """
    with storage_errors(to, verb="read"):
        run = next((folder for folder in to.parents if is_run(folder)), None)
        if run is not None:
            raise UsageError(
                f"{to} lies in the run {run}, which holds what its training wrote and nothing else",
                hint="choose a folder outside of the run",
            )
        if to.exists() and (to == Path.cwd() or to.is_mount()):
            what = "the folder you are in" if to == Path.cwd() else "where a disk is mounted"
            raise UsageError(
                f"{to} is {what}, and a new folder takes the place of the old one",
                hint=f"name a new folder in it, such as {to / 'model'}",
            )


def refuse_full_disk(to: Path, *, needed_bytes: int) -> None:
    """Refuses what the disk cannot hold.

    Raises:
        StorageError: fewer bytes are free; both numbers are said.
    """
    needed, free = needed_bytes + SPARE_BYTES, free_bytes(to)
    if free < needed:
        raise StorageError(
            f"{to} needs {format_bytes(needed)}, {format_bytes(free)} are free",
            hint="free some space, or choose a folder on another disk",
        )


@contextlib.contextmanager
def new_folder(to: Path, *, refuse_filled: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder beside the target that gets its name when the block ends well.

    What the target held is deleted then, not before. After an error nothing of it is left; what
    a killed process left is deleted by the next one with the same target.

    Args:
        to: the target.
        refuse_filled: raises where the target holds what may not be replaced. Asked at the end,
            since the block takes long enough for others to put something there.

    Raises:
        StorageError: the folder cannot be made, or not be named.
    """
    temporary = to.with_name(f".making-{to.name}-{os.getpid()}")
    with storage_errors(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        _delete_unfinished(to)
        temporary.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # some disks take no locks
                _lock(temporary, stack)
            yield temporary
            refuse_filled()
            with storage_errors(to, verb="read"):
                is_filled = to.exists() and any(to.iterdir())
            # Onto an empty folder a rename works, and fails if something has come into it.
            doomed = to.with_name(f".replaced-{to.name}-{os.getpid()}") if is_filled else None
            publish_folder(temporary, final=to, doomed=doomed)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _delete_unfinished(to: Path) -> None:
    """Deletes what killed processes left of the same target; a living one holds a lock."""
    name = re.compile(rf"\.making-{re.escape(to.name)}-\d+")
    for entry in to.parent.iterdir():
        if name.fullmatch(entry.name) and not entry.is_symlink():
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                _lock(entry, stack)
                shutil.rmtree(entry)


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Locks a folder until the stack is closed or the process ends, however it does.

    Raises:
        OSError: another process holds it, or the disk takes no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
