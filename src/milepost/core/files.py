"""Files that are whole or absent, and append-only logs that survive a torn last line.

The only module that renames. Every failure of the disk becomes a `StorageError` that names
the path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milepost.core.errors import MilepostError, RunInUseError, StorageError

HASH_BLOCK_BYTES = 1 << 20
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How a library written in Rust, as safetensors is, gives the system's error number."""


@contextlib.contextmanager
def storage_errors(path: Path, *, verb: str = "write") -> Iterator[None]:
    """Turns what a failing disk raises inside the block into a `StorageError` naming `path`."""
    try:
        yield
    except OSError as error:
        raise as_storage_error(error, what=str(path), verb=verb) from error


def as_storage_error(error: OSError, *, what: str, verb: str = "write") -> StorageError:
    """The `StorageError` that says what `error` means for what was read or written."""
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space and run the same command again; nothing that was saved is lost"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "allow more open files (ulimit -n), then run the same command again"
    elif error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = "check the disk, then run the same command again"
    elif verb == "read":
        hint = "make it readable for this user, then run the same command again"
    else:
        hint = "choose a folder that can be written"
    return StorageError(f"cannot {verb} {what}: {reason}", hint=hint)


def system_error(error: Exception) -> OSError | None:
    """The system's error that a library's error tells of in its text; None where it does not."""
    match = _SYSTEM_ERROR.search(str(error))
    if match is None:
        return None
    number = int(match.group(1))
    return OSError(number, os.strerror(number))


def plain_file(path: Path, *, error: type[MilepostError]) -> Path:
    """`path` itself if it is a regular file: a link leaves its folder, a pipe blocks its reader.

    Raises:
        error: it is missing, a link, a pipe or the like.
        StorageError: the disk does not say.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise error(f"{path} is missing") from missing
    except OSError as failure:
        raise as_storage_error(failure, what=str(path), verb="read") from failure
    if stat.S_ISREG(mode):
        return path
    if stat.S_ISLNK(mode):
        raise error(
            f"{path} is a symbolic link", hint="copy the folder with its links resolved (cp -rL)"
        )
    raise error(f"{path} is not a regular file")


def fsync_file(path: Path) -> None:
    """Forces the bytes of one file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Forces the names in one folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that `path` holds all of the content or what was there before.

    Raises:
        StorageError: the disk is full, read-only or failing; `path` is as it was.
    """
    data = content if isinstance(content, bytes) else as_utf8(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if temporary.read_bytes() != data:  # a write that fell short without an error
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def as_utf8(text: str) -> bytes:
    """UTF-8; a lone surrogate (a file name that is not UTF-8) as \\udcXX, JSON's escape of it."""
    return text.encode(errors="backslashreplace")


def remove_unfinished(path: Path) -> None:
    """Deletes what killed calls of `write_atomically` for `path` left beside it."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    with storage_errors(path.parent):
        for entry in path.parent.iterdir():
            if name.fullmatch(entry.name) and stat.S_ISREG(entry.lstat().st_mode):
                entry.unlink()


def write_json(path: Path, value: Any) -> None:
    """Writes strict, indented JSON atomically; numbers that are not finite become null."""
    write_atomically(path, json_document(value))


def json_document(value: Any) -> str:
    """The one text that `write_json` writes for a value."""
    return json.dumps(strict(value), indent=2, ensure_ascii=False) + "\n"


def strict(value: Any) -> Any:
    """A copy of `value` that strict JSON can hold: non-finite floats null, paths as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def read_json(path: Path, *, error: type[MilepostError]) -> Any:
    """Reads a JSON file written by us.

    Raises:
        error: the file is missing or not JSON; the message names it.
        StorageError: it is there and cannot be read, which says nothing of what it holds.
    """
    try:
        return json.loads(_read_regular_file(path))
    except FileNotFoundError as missing:
        raise error(f"{path} is missing") from missing
    except OSError as failure:
        raise as_storage_error(failure, what=str(path), verb="read") from failure
    except (ValueError, RecursionError) as bad:
        raise error(f"{path} cannot be read as JSON: {bad}") from bad


def read_json_of_version(path: Path, *, version: int, error: type[MilepostError]) -> Any:
    """As `read_json`, of a file whose field `v` says which version of its schema it has.

    Raises:
        error: the file is missing, not JSON, or of a later version than this one.
        StorageError: as `read_json`.
    """
    values = read_json(path, error=error)
    found = values.get("v") if isinstance(values, dict) else None
    if isinstance(found, int) and found > version:
        raise error(
            f"{path} has schema version {found}, this program reads {version}",
            hint="use the version of Milepost that made the run, or a later one",
        )
    return values


def _read_regular_file(path: Path) -> bytes:
    """All bytes of a file; of anything else none, as a pipe would hold its reader for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(
            f"cannot read {path}: it is not a regular file",
            hint="put the file back from a copy, then run the same command again",
        )
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def publish_folder(temporary: Path, *, final: Path, doomed: Path | None = None) -> None:
    """Makes a finished temporary folder appear under its final name, or not at all.

    Every file and folder in it is forced to the disk first, then renamed, then the parent is
    forced.

    Args:
        temporary: the folder with everything in it, beside `final`.
        final: its name from now on.
        doomed: where what has that name now goes, to be deleted when the new one is on the disk;
            None: nothing has it.
    """
    with storage_errors(final):
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync_file(Path(folder) / name)
            fsync_folder(Path(folder))
        replaced = doomed if final.exists() else None
        if replaced is not None:
            final.rename(replaced)
        temporary.rename(final)
        fsync_folder(final.parent)
        if replaced is not None:
            shutil.rmtree(replaced)


def move_aside(path: Path, *, folder: Path) -> Path:
    """Moves a file or folder into `folder` under a name that is free there; returns the place."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        target, number = folder / path.name, 1
        while target.exists() or target.is_symlink():
            number += 1
            target = folder / f"{path.name}.{number}"
        path.rename(target)
        fsync_folder(path.parent)
    return target


def delete_folder(path: Path, *, doomed: Path) -> None:
    """Deletes a folder so that no half of it is ever seen under its own name.

    Args:
        path: the folder.
        doomed: the name it has while it goes; a kill leaves it there as litter.
    """
    with storage_errors(path):
        path.rename(doomed)
        shutil.rmtree(doomed)


def sha256_of_file(path: Path) -> str:
    """The hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """The hex SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(strict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def append_json_line(path: Path, record: dict[str, Any], *, is_durable: bool = False) -> None:
    """Appends one JSON line under a lock; a torn last line is ended with a newline first.

    Args:
        path: the log.
        record: the line.
        is_durable: force the line to the disk before returning.

    Raises:
        StorageError: the line could not be written whole; nothing of it stays in the file.
    """
    line = json.dumps(strict(record), ensure_ascii=False, separators=(",", ":")) + "\n"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + as_utf8(line)
            try:
                _write_all(descriptor, data)
                if is_durable:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
            if is_durable:
                fsync_folder(path.parent)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All records of a log and how many lines could not be read.

    A line that is torn, not JSON or not an object is skipped and counted. A missing file is an
    empty log.

    Raises:
        StorageError: it is there and cannot be read.
    """
    records: list[dict[str, Any]] = []
    num_bad = 0
    try:
        lines = _read_regular_file(path).split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as failure:
        raise as_storage_error(failure, what=str(path), verb="read") from failure
    for line in lines:
        if not line.strip():
            continue
        record = record_in(line)
        if record is None:
            num_bad += 1
        else:
            records.append(record)
    return records, num_bad


def record_in(line: bytes) -> dict[str, Any] | None:
    """The record that a line of a log holds; None where it is torn, not JSON or no object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


@contextlib.contextmanager
def exclusive_lock(path: Path, *, what: str) -> Iterator[None]:
    """Holds the lock file at `path` for the block; a dead process's lock is free by itself.

    Raises:
        RunInUseError: another living process holds it; the message names its id.
        StorageError: the file cannot be written, or the disk takes no locks.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with storage_errors(path, verb="lock"):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as busy:
                holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
                raise RunInUseError(
                    f"{what} is in use by process {holder}",
                    hint="wait until it ends, or stop it (kill -TERM), then run this again",
                ) from busy
        with storage_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def folder_bytes(path: Path) -> int:
    """Bytes of all regular files under a folder."""
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where `path` is or will be."""
    place = path
    with storage_errors(path, verb="read"):
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free
