"""Which folder an export may go to."""

from __future__ import annotations

from pathlib import Path

from milepost.core.errors import UsageError
from milepost.core.files import storage_errors

RECORD_FILE = "milepost-export.json"
"""What was exported and how; only a folder that has it is ever overwritten."""


def refuse_target(to: Path, *, may_overwrite: bool) -> None:
    """Refuses a target that holds something, before time is spent.

    Raises:
        UsageError: it is not a folder, or holds something that may not be overwritten.
        StorageError: it cannot be read.
    """
    with storage_errors(to, verb="read"):
        if not to.exists():
            return
        if not to.is_dir():
            raise UsageError(f"{to} is not a folder", hint="choose another name with --to")
        names = sorted(entry.name for entry in to.iterdir())
    if not names:
        return
    if RECORD_FILE not in names:
        raise UsageError(
            f"{to} is not empty and no export: it holds {names[0]}",
            hint="choose a new folder with --to; --overwrite replaces earlier exports only",
        )
    if not may_overwrite:
        raise UsageError(
            f"{to} holds an export already", hint="choose another --to, or add --overwrite"
        )
