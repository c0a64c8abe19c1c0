"""A new folder that appears whole or not at all, on a disk that has room for it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from milepost.core.errors import StorageError
from milepost.core.files import free_bytes, publish_folder, storage_errors
from milepost.core.units import format_bytes

SPARE_BYTES = 4 << 20
"""Room for the small files and for the file system's own."""


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
def new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder beside the target that gets its name when the block ends well.

    What the target held is deleted then, not before. After an error nothing of it is left.

    Raises:
        StorageError: the folder cannot be made, or not be named.
    """
    temporary = to.with_name(f".making-{to.name}-{os.getpid()}")
    with storage_errors(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number
        temporary.mkdir()
    try:
        yield temporary
        doomed = to.with_name(f".replaced-{to.name}-{os.getpid()}")
        publish_folder(temporary, final=to, doomed=doomed)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
