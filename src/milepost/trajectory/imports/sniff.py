"""What lies at a path, for messages on what was expected and what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from milepost.core.errors import UsageError
from milepost.core.files import storage_errors
from milepost.core.units import format_bytes
from milepost.trajectory.imports.wandb_log import MAGIC
from milepost.trajectory.sections.wording import enumerate_words, plural

HEAD_BYTES = 512
MAX_ENTRIES = 100_000
MAX_SUFFIXES_TOLD = 4


def files_in(path: Path, *, pattern: str = "*") -> list[Path]:
    """The regular files of a folder and its folders, in order of their paths, or the file itself.

    Raises:
        UsageError: there is nothing at the path, or a folder holds too many files to look at.
        StorageError: it cannot be read.
    """
    with storage_errors(path, verb="read"):
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise UsageError(f"there is nothing at {path}", hint="give a file or a folder")
        entries = list(islice(path.rglob("*"), MAX_ENTRIES + 1))
        if len(entries) > MAX_ENTRIES:
            raise UsageError(
                f"{path} has more than {MAX_ENTRIES:,} files",
                hint="give the folder of the one trajectory",
            )
        return sorted(entry for entry in entries if entry.match(pattern) and entry.is_file())


def refuse(path: Path, *, expected: str) -> UsageError:
    """The error for a path of another format: what was expected and what was found."""
    kind, words = found_at(path)
    hint = f"expected {expected}"
    if kind is not None:
        hint = f"it looks like the format {kind}: --import {kind}:{path}; {hint}"
    return UsageError(f"{path} is {words}", hint=hint)


def limit_size(files: Sequence[Path], *, max_bytes: int, what: str) -> None:
    """Refuses files that are together too large to be read.

    Raises:
        UsageError: they are.
        StorageError: the disk does not say.
    """
    with storage_errors(files[0], verb="read"):
        size = sum(file.stat().st_size for file in files)
    if size > max_bytes:
        raise UsageError(
            f"{files[0]} has {format_bytes(size)}"
            + (f" with the {len(files) - 1:,} files beside it" if len(files) > 1 else "")
            + f"; {what} is read up to {format_bytes(max_bytes)}",
            hint="export fewer metrics, or every tenth step, and import that",
        )


def found_at(path: Path) -> tuple[str | None, str]:
    """The format that a path looks like, None where it looks like none, and what it is."""
    with storage_errors(path, verb="read"):
        if path.is_dir():
            return _found_in(files_in(path))
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    return _kind_of(path.name, head)


def _found_in(files: list[Path]) -> tuple[str | None, str]:
    if not files:
        return None, "an empty folder"
    suffixes = Counter(file.suffix or "no ending" for file in files)
    told = [
        f"{plural(n, 'file')} of {suffix}" for suffix, n in suffixes.most_common(MAX_SUFFIXES_TOLD)
    ]
    if len(suffixes) > MAX_SUFFIXES_TOLD:
        told.append("others")
    kinds = [_kind_of_name(file.name) for file in files]
    kind = next((kind for kind in kinds if kind is not None), None)
    return kind, f"a folder with {enumerate_words(told)}"


def _kind_of_name(name: str) -> str | None:
    if ".tfevents." in name:
        return "tensorboard"
    return "wandb" if name.endswith(".wandb") else None


def _kind_of(name: str, head: bytes) -> tuple[str | None, str]:
    if head.startswith(MAGIC):
        return "wandb", "a run file of wandb"
    if ".tfevents." in name:
        return "tensorboard", "a TensorBoard event file"
    if not head:
        return None, "an empty file"
    if head.startswith(b"PAR1"):
        return "wandb", "a Parquet file"
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return None, "a file that is not text"
    if "\0" in text:
        return None, "a file that is not text"
    start = text.lstrip()
    if start.startswith("<"):
        return None, "a page of HTML or XML"
    if start.startswith(("{", "[")):
        return ("lm-eval" if '"results"' in text else None), "a JSON file"
    first = start.splitlines()[0] if start else ""
    if any(mark in first for mark in ",;\t"):
        return "csv", f"a table that begins with {first[:80]!r}"
    return None, f"a text that begins with {first[:80]!r}"
