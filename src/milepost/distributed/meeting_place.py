"""The temporary folder in which the ranks of one launcher meet, gone when the launcher is.

A launcher that is killed cannot delete its folder; the next one does. A living launcher holds a
lock on its folder, so a folder without a lock has nobody left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from milepost.core.files import storage_errors

PREFIX = "milepost-ranks-"


@contextlib.contextmanager
def meeting_place() -> Iterator[Path]:
    """A new folder for the block; those that killed launchers left are deleted first.

    Raises:
        StorageError: no folder for temporary files can be written.
    """
    with storage_errors(Path(os.environ.get("TMPDIR", "/tmp"))):
        _delete_abandoned(Path(tempfile.gettempdir()))
        folder, descriptor = _make_and_lock()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _make_and_lock() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        descriptor = _lock(folder)
        if descriptor is not None:
            return folder, descriptor
        # Another launcher found it before its lock, and deletes it.


def _delete_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        descriptor = _lock(folder)
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None where it is held, gone or another's."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_uid == os.geteuid() and folder.exists():
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
