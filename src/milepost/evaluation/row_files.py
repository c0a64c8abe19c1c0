"""Where a benchmark's rows lie: in a folder of files, or on the hub, fetched once and kept."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from milepost.core.errors import DataError, StorageError
from milepost.core.files import publish_folder, sha256_of_file, storage_errors
from milepost.evaluation.rows import find_row_file


@dataclass(frozen=True)
class RowFile:
    """One file of rows.

    Attributes:
        name: in messages; its ending says its form.
        path: where it lies.
        sha256: of its bytes.
    """

    name: str
    path: Path
    sha256: str


def local_row_file(folder: Path, *, benchmark: str, split: str) -> RowFile:
    """The file of a split of a benchmark in a folder; see `find_row_file`."""
    found = find_row_file(folder, benchmark=benchmark, split=split)
    assert found.path is not None
    with storage_errors(found.path, verb="read"):
        return RowFile(found.name, found.path, sha256_of_file(found.path))


@contextlib.contextmanager
def hub_row_files(source: str, *, folder: Path) -> Iterator[list[RowFile]]:
    """The files of a source on the hub, for the block.

    What was fetched once is used from then on, without the network. Where the folder cannot be
    written, the files are fetched again each time.

    Args:
        source: as `find_hub_files` takes it.
        folder: where its files are kept.

    Raises:
        DataError: the hub does not give them.
    """
    kept = _kept(folder)
    if kept:
        yield kept
        return
    with tempfile.TemporaryDirectory() as temporary:
        fetched = _fetch(source, Path(temporary))
        if not _kept(folder):  # another process may have been quicker
            with contextlib.suppress(StorageError):
                _keep(fetched, folder)
        yield fetched


def _fetch(source: str, folder: Path) -> list[RowFile]:
    from milepost.data.hub import Fetcher, find_hub_files

    try:
        files = find_hub_files(source)
        with Fetcher(folder, files=files) as fetcher:
            paths = [fetcher.path(file) for file in files]
    except DataError as error:
        raise DataError(
            error.message,
            hint=f"{error.hint}; or give the rows as files: --data-dir, "
            "in a recipe evaluation.data_dir",
        ) from error
    return [
        RowFile(file.name, path, sha256_of_file(path))
        for file, path in zip(files, paths, strict=True)
    ]


def _keep(files: list[RowFile], folder: Path) -> None:
    """Copies fetched files under names that hold their hashes; the folder appears whole."""
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():  # damaged, or it would have been used
            shutil.rmtree(folder)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".fetched-"))
    try:
        with storage_errors(temporary):
            for number, file in enumerate(files, start=1):
                name = f"{number:03d}-of-{len(files)}-{file.sha256}{Path(file.name).suffix}"
                shutil.copyfile(file.path, temporary / name)
        publish_folder(temporary, final=folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _kept(folder: Path) -> list[RowFile]:
    """Files that were kept and are as they were fetched; none if any is not."""
    try:
        names = sorted(path.name for path in folder.iterdir())
        files = [RowFile(str(folder / n), folder / n, sha256_of_file(folder / n)) for n in names]
    except OSError:
        return []
    are_whole = all(f"-of-{len(files)}-{file.sha256}" in file.path.name for file in files)
    return files if are_whole else []
