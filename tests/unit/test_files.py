"""Files that are whole or absent: what reading and writing them says when it fails."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from milepost.core.errors import CheckpointError, StorageError
from milepost.core.files import (
    append_json_line,
    exclusive_lock,
    plain_file,
    read_json,
    read_json_lines,
    remove_unfinished,
    storage_errors,
    system_error,
    write_atomically,
    write_json,
)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read_says_nothing_of_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StorageError) as caught:
        read_json(tmp_path / "manifest.json", error=CheckpointError)
    expected = f"cannot read {tmp_path / 'manifest.json'}: {os.strerror(number).lower()}"
    assert caught.value.message == expected
    assert ("ulimit -n" in str(caught.value.hint)) == (number == errno.EMFILE)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_said_and_not_waited_for(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "log")
    expected = f"cannot read {tmp_path / 'log'}: it is not a regular file"
    with pytest.raises(StorageError) as caught:
        read_json(tmp_path / "log", error=CheckpointError)
    assert caught.value.message == expected
    with pytest.raises(StorageError) as caught:
        read_json_lines(tmp_path / "log")
    assert caught.value.message == expected


def test_names_that_are_not_utf8_are_written_as_json_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"run-\xff")
    write_json(tmp_path / "a.json", {"name": name})
    assert read_json(tmp_path / "a.json", error=CheckpointError) == {"name": name}


def test_a_missing_or_torn_json_file_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        read_json(path, error=CheckpointError)
    path.write_text('{"v": ')
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_json(path, error=CheckpointError)


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("text")
    assert plain_file(tmp_path / "plain", error=CheckpointError) == tmp_path / "plain"
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("absent", "absent is missing"),
        ("plain/below", "below is missing"),
        ("link", "link is a symbolic link"),
        ("pipe", "pipe is not a regular file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            plain_file(tmp_path / name, error=CheckpointError)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "can be written"),
        (errno.EFBIG, "check the disk"),
    ],
)
def test_errors_of_the_disk_are_named_as_the_system_names_them(
    tmp_path: Path, number: int, hint: str
) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.message == f"cannot write {tmp_path}: {os.strerror(number).lower()}"
    assert hint in str(caught.value.hint)


def test_the_systems_number_is_read_from_a_librarys_words() -> None:
    found = system_error(ValueError("I/O error: File too large (os error 27)"))
    assert found is not None and found.errno == errno.EFBIG
    assert system_error(ValueError("invalid header")) is None


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kill = (
        "import os, sys; from pathlib import Path; from milepost.core import files\n"
        "Path.replace = lambda *_: os._exit(9)\n"
        "files.write_atomically(Path(sys.argv[1]), 'text')"
    )
    path = tmp_path / "manifest.json"
    assert subprocess.run([sys.executable, "-c", kill, str(path)]).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    write_atomically(path, "text")
    others = [".manifest.json.bak", ".manifest.json.12.tmp.old", ".other.json.12.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".manifest.json.7.tmp").symlink_to(path)
    remove_unfinished(path)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"manifest.json", ".manifest.json.7.tmp", *others}


def test_a_durable_line_is_on_the_disk_or_not_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(path.stat().st_size))
    append_json_line(path, {"step": 1})
    assert forced == []
    append_json_line(path, {"step": 2}, is_durable=True)
    assert forced == [path.stat().st_size] * 2, "the log and its folder"

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"cannot write .*events\.jsonl: input/output error"):
        append_json_line(path, {"step": 3}, is_durable=True)
    assert read_json_lines(path) == ([{"step": 1}, {"step": 2}], 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_takes_no_locks_is_told_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = f"cannot lock {tmp_path / '.lock'}: {os.strerror(number).lower()}"
    with (
        pytest.raises(StorageError, match=re.escape(told)),
        exclusive_lock(tmp_path / ".lock", what="the run"),
    ):
        pass
