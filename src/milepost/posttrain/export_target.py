"""Which folder an export may go to, and the record by which an earlier one is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milepost.core.errors import UsageError
from milepost.core.files import read_json, sha256_of_file, storage_errors
from milepost.posttrain.new_folder import refuse_place

CARD_FILE = "README.md"
RECORD_FILE = "milepost-export.json"
"""What was exported and how; only a folder that has it is ever overwritten."""


def refuse_target(to: Path, *, may_overwrite: bool) -> None:
    """Refuses a target that holds something, or would harm what lies around it.

    Args:
        to: the new folder, resolved.
        may_overwrite: whether an earlier export may be replaced. Only what that export wrote:
            files that somebody added, and a model card that somebody edited, are never deleted.

    Raises:
        UsageError: it is no place for an export, or holds what may not be overwritten.
        StorageError: it cannot be read.
    """
    if not (to.name.isprintable() and _is_unicode(to)):
        raise UsageError(
            f"{str(to)!r} has characters that do not print, and files are named by it",
            hint="choose another name with --to",
        )
    refuse_place(to)
    with storage_errors(to, verb="read"):
        if not to.exists():
            return
        if not to.is_dir():
            raise UsageError(f"{to} is not a folder", hint="choose another name with --to")
        names = {entry.name for entry in to.iterdir()}
    if not names:
        return
    if RECORD_FILE not in names:
        raise UsageError(
            f"{to} is not empty and no export: it holds {min(names)}",
            hint="choose a new folder with --to; --overwrite replaces earlier exports only",
        )
    if not may_overwrite:
        raise UsageError(
            f"{to} holds an export already", hint="choose another --to, or add --overwrite"
        )
    _refuse_changes(to, names)


def _is_unicode(path: Path) -> bool:
    """Whether a path has a UTF-8 form, without which not every library can write there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def record_of_files(folder: Path) -> dict[str, Any]:
    """What a later export must find unchanged to overwrite this one; the record is not there yet.

    Raises:
        StorageError: a file cannot be read.
    """
    with storage_errors(folder, verb="read"):
        sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
        return {"files": sizes, "card_sha256": sha256_of_file(folder / CARD_FILE)}


def _refuse_changes(to: Path, names: set[str]) -> None:
    """Refuses to delete what an earlier export did not write."""
    record = read_json(to / RECORD_FILE, error=UsageError)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict):
        raise UsageError(
            f"{to / RECORD_FILE} does not say which files the export wrote",
            hint="choose another --to, or delete the folder yourself",
        )
    if added := names - set(files) - {RECORD_FILE}:
        raise UsageError(
            f"{to / min(added)} is not of the export that lies there",
            hint="move it away, or choose another --to; --overwrite deletes what an export wrote",
        )
    with storage_errors(to, verb="read"):
        if CARD_FILE in names and sha256_of_file(to / CARD_FILE) != record.get("card_sha256"):
            raise UsageError(
                f"{to / CARD_FILE} has been edited since it was exported",
                hint="move it away, or choose another --to; --overwrite would lose the edits",
            )
