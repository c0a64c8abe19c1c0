"""Sources: files and folders of text, JSON lines and Parquet, as lists of files to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from milepost.core.errors import DataError

Kind = Literal["text", "json_lines", "json_list", "parquet"]
Compression = Literal["gzip", "zstd"] | None
Forms = Mapping[str, tuple[Kind, Compression]]

FORMS: Forms = {
    ".txt": ("text", None),
    ".jsonl": ("json_lines", None),
    ".jsonl.gz": ("json_lines", "gzip"),
    ".jsonl.zst": ("json_lines", "zstd"),
    ".parquet": ("parquet", None),
}
"""What a file's ending says about it, where texts are read."""

HUB_PREFIX = "hf://"


@dataclass(frozen=True)
class HubPlace:
    """Where a file lies on the hub.

    Attributes:
        repository: owner/name of the dataset.
        commit: the commit that is read.
        path: in the repository.
        sha256: of the file, None where the hub does not say.
    """

    repository: str
    commit: str
    path: str
    sha256: str | None


@dataclass(frozen=True)
class SourceFile:
    """One file that documents are read from.

    Attributes:
        name: what it is called in messages and in the manifest.
        kind, compression: how it is read.
        size_bytes: of the file as it lies.
        modified_ns: time of its last change, 0 for a file of the hub.
        path: where it lies; None for a file of the hub until it is fetched.
        hub: its place on the hub, None for a local file.
    """

    name: str
    kind: Kind
    compression: Compression
    size_bytes: int
    modified_ns: int
    path: Path | None
    hub: HubPlace | None = None


def form_of(name: str, *, forms: Forms = FORMS) -> tuple[Kind, Compression] | None:
    """The kind and compression that a file's name says, None where it is not known."""
    lower = name.lower()
    for ending, form in forms.items():
        if lower.endswith(ending):
            return form
    return None


def find_files(sources: Sequence[str | Path], *, forms: Forms = FORMS) -> list[SourceFile]:
    """All files of the sources: in the order given, those of a folder sorted by path.

    Args:
        sources: files, folders, or `hf://datasets/...`.
        forms: which files are read, by their endings.

    Raises:
        DataError: a source is missing, empty, or of a kind that is not read.
    """
    files: list[SourceFile] = []
    for source in sources:
        if str(source).startswith(HUB_PREFIX):
            from milepost.data.hub import find_hub_files

            files += find_hub_files(str(source), forms=forms)
        else:
            files += _local_files(Path(source), forms)
    counts = Counter(place_of(file) for file in files)
    for file in files:
        if counts[place_of(file)] > 1:
            raise DataError(f"{file.name} is given twice", hint="name each source once")
    return files


def place_of(file: SourceFile) -> str:
    """What tells whether two names mean the same file."""
    return file.name if file.path is None else str(file.path.resolve())


def _local_files(source: Path, forms: Forms) -> list[SourceFile]:
    known = ", ".join(forms)
    if source.is_dir():
        found = sorted(
            path
            for path in source.rglob("*")
            if path.is_file() and form_of(path.name, forms=forms) and not _is_hidden(path, source)
        )
        if not found:
            raise DataError(f"{source} holds no file that is read", hint=f"read: {known}")
        return [_local_file(path, forms) for path in found]
    if not source.exists():
        raise DataError(f"there is no source {source}", hint="check the path")
    if not source.is_file():
        raise DataError(f"{source} is neither a file nor a folder", hint=f"read: {known}")
    if form_of(source.name, forms=forms) is None:
        raise DataError(f"{source} is of a kind that is not read", hint=f"read: {known}")
    return [_local_file(source, forms)]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _local_file(path: Path, forms: Forms) -> SourceFile:
    form = form_of(path.name, forms=forms)
    assert form is not None
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return SourceFile(
        name=str(path),
        kind=form[0],
        compression=form[1],
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        path=path,
    )
