"""Files of Hugging Face's hub: found by path or pattern, fetched one ahead of the work.

The commit that a revision names is looked up once; what is read, and what the manifest says,
is that commit.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import itertools
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from milepost.core.console import say
from milepost.core.errors import DataError, UsageError
from milepost.core.files import sha256_of_file, storage_errors
from milepost.core.units import format_bytes
from milepost.data.sources import FORMS, Forms, HubPlace, SourceFile, form_of

DATASETS_PREFIX = "hf://datasets/"
FETCH_BYTES = 16 << 20
"""So much is asked for at once; a break loses no more."""

_PATTERN_CHARACTERS = "*?["


def find_hub_files(source: str, *, forms: Forms = FORMS) -> list[SourceFile]:
    """The files that `hf://datasets/owner/name[@revision][/path-or-pattern]` means, by path.

    A path may be of a file, of a folder, or a pattern with * and ?; * stands for anything but a
    slash, ** for anything. A revision that holds slashes is written with %2F.

    Raises:
        UsageError: the source is not of that form.
        DataError: there is nothing of that name, or the hub cannot be reached.
    """
    repository, revision, path = _split(source)
    with _hub_errors(source):
        from huggingface_hub import HfApi

        api = HfApi()
        info = api.repo_info(repository, revision=revision, repo_type="dataset")
        commit = str(info.sha)
        entries = list(_entries(api, repository, commit, path))
    files = [
        SourceFile(
            name=f"{DATASETS_PREFIX}{repository}@{commit}/{entry.path}",
            kind=form[0],
            compression=form[1],
            size_bytes=int(entry.size),
            modified_ns=0,
            path=None,
            hub=HubPlace(
                repository, commit, entry.path, sha256=entry.lfs.sha256 if entry.lfs else None
            ),
        )
        for entry in sorted(entries, key=lambda entry: entry.path)
        if (form := form_of(entry.path, forms=forms)) and _matches(entry.path, path)
    ]
    if not files:
        raise DataError(f"{source} holds no file that is read", hint=f"read: {', '.join(forms)}")
    return files


def _split(source: str) -> tuple[str, str | None, str]:
    """Repository, revision and path of a source."""
    parts = source.removeprefix(DATASETS_PREFIX).split("/")
    if not source.startswith(DATASETS_PREFIX) or len(parts) < 2 or not all(parts[:2]):
        raise UsageError(
            f"{source} is not the name of a dataset on the hub",
            hint="write hf://datasets/owner/name/path, such as "
            "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",
        )
    name, _, revision = parts[1].partition("@")
    path = "/".join(part for part in parts[2:] if part)
    return f"{parts[0]}/{name}", urllib.parse.unquote(revision) or None, path


def _entries(api: Any, repository: str, commit: str, path: str) -> Iterator[Any]:
    """All files at or under the part of the path before the first pattern."""
    from huggingface_hub.hf_api import RepoFile

    where: dict[str, Any] = {"revision": commit, "repo_type": "dataset"}
    plain = itertools.takewhile(lambda part: not _is_pattern(part), path.split("/"))
    base = "/".join(plain)
    found = api.get_paths_info(repository, [base], **where) if base else []
    if any(isinstance(entry, RepoFile) for entry in found):
        yield from found
    elif found or not base:
        tree = api.list_repo_tree(repository, base or None, recursive=True, **where)
        yield from (entry for entry in tree if isinstance(entry, RepoFile))


def _is_pattern(text: str) -> bool:
    return any(character in text for character in _PATTERN_CHARACTERS)


def _matches(path: str, wanted: str) -> bool:
    """Whether a file is what a path or pattern means."""
    if not _is_pattern(wanted):
        return not wanted or path == wanted or path.startswith(wanted + "/")
    if "**" in wanted:
        return fnmatch.fnmatchcase(path, wanted.replace("**/", "*").replace("**", "*"))
    parts, patterns = path.split("/"), wanted.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


class Fetcher:
    """Brings source files to the disk: local ones lie there, the hub's next one is fetched
    while the last one is in work."""

    def __init__(self, folder: Path, *, files: list[SourceFile]) -> None:
        """Args:
        folder: where fetched files lie until they are forgotten.
        files: all source files, in the order of the work.
        """
        self._folder = folder
        self._files = [file for file in files if file.hub is not None]
        self._fetched: dict[str, Future[Path]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetcher")

    def path(self, file: SourceFile) -> Path:
        """Where a file lies; waits until it is fetched.

        Raises:
            DataError: the hub does not give it.
            StorageError: there is no room for it.
        """
        if file.path is not None:
            return file.path
        number = self._files.index(file)
        for wanted in self._files[number : number + 2]:
            if wanted.name not in self._fetched:
                self._fetched[wanted.name] = self._thread.submit(self._fetch, wanted)
        return self._fetched[file.name].result()

    def _fetch(self, file: SourceFile) -> Path:
        """Streams a file to the disk, from where an earlier call broke off."""
        assert file.hub is not None
        target = self._folder / hashlib.sha256(file.name.encode()).hexdigest()[:16]
        target = target.with_suffix(Path(file.name).suffix)
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            done_bytes = target.stat().st_size if target.exists() else 0
        if done_bytes < file.size_bytes:
            already = f", {format_bytes(done_bytes)} are here already" if done_bytes else ""
            say(f"fetching {file.name} ({format_bytes(file.size_bytes)}{already})")
            with _hub_errors(file.name):
                _stream(file, target, done_bytes)
        _check(file, target)
        return target

    def forget(self, file: SourceFile) -> None:
        """Deletes what was fetched of a file that is done."""
        if file.name in self._fetched:
            self._fetched.pop(file.name).result().unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _stream(file: SourceFile, target: Path, done_bytes: int) -> None:
    from huggingface_hub import HfFileSystem

    assert file.hub is not None
    remote_path = f"datasets/{file.hub.repository}@{file.hub.commit}/{file.hub.path}"
    with HfFileSystem().open(remote_path, "rb", cache_type="none") as remote:
        remote.seek(done_bytes)
        while data := remote.read(FETCH_BYTES):
            with storage_errors(target), target.open("ab") as local:
                local.write(data)


def _check(file: SourceFile, target: Path) -> None:
    assert file.hub is not None
    size, sha256 = target.stat().st_size, file.hub.sha256
    if size == file.size_bytes and sha256 in (None, sha256_of_file(target)):
        return
    target.unlink()
    raise DataError(
        f"{file.name} came with other bytes than the hub says", hint="run the same command again"
    )


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turns what the hub's client raises into errors that say what to do."""
    from huggingface_hub import errors

    # The bases of its own error are those of the HTTP client below, which changed its name.
    network = (*errors.HfHubHTTPError.__bases__, OSError)
    try:
        yield
    except errors.GatedRepoError as error:
        hint = "accept the dataset's terms on its page, then log in with: hf auth login"
        raise DataError(f"{what} is gated", hint=hint) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        hint = "check owner, name and revision; a private dataset needs: hf auth login"
        raise DataError(f"there is no dataset for {what} on the hub", hint=hint) from error
    except errors.HFValidationError as error:
        raise UsageError(
            f"{what} is not the name of a dataset: {error}",
            hint="write hf://datasets/owner/name/path",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(what, error) from error
    except errors.EntryNotFoundError as error:
        raise DataError(f"there is no {what} on the hub", hint="check the path") from error
    except network as error:
        raise _unreachable(what, error) from error


def _unreachable(what: str, error: Exception) -> DataError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(
        f"{what} cannot be fetched: {first_line}",
        hint="check the network, then run the same command again: it goes on where it stopped",
    )
