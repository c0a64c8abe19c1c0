"""What is printed where nobody reads, where no room is left, and where letters are missing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milepost.core import console
from milepost.core.errors import StorageError

PLAN = [sys.executable, "-m", "milepost", "plan", "demo", "--json"]


def ascii_stream() -> tuple[io.BytesIO, io.TextIOWrapper]:
    content = io.BytesIO()
    return content, io.TextIOWrapper(content, encoding="ascii")


def full_stream() -> io.TextIOWrapper:
    return Path("/dev/full").open("w", encoding="utf-8")


def test_data_that_a_full_disk_does_not_take_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with full_stream() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        for write in (console.show, console.show_json):
            with pytest.raises(StorageError) as caught:
                write("a number")
            assert caught.value.message == "cannot write standard output: no space left on device"
            # What was not written is gone, so that the flush at the end of a program succeeds.
            stream.flush()
            stream = full_stream()
            monkeypatch.setattr(sys, "stdout", stream)


def test_a_verb_that_cannot_write_its_data_exits_with_7() -> None:
    with full_stream() as stream:
        result = subprocess.run(PLAN, stdout=stream, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 7
    assert result.stderr.startswith("error: cannot write standard output: no space left on device")
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console.show("one line")
        console.show("another")


def test_data_for_an_output_that_is_closed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(StorageError, match="cannot write standard output: it is closed"):
        console.show_json({})
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    with pytest.raises(StorageError, match=r"cannot write standard output: .*closed file"):
        console.show("a number")


@pytest.mark.parametrize("stream", [None, "full", "closed"])
def test_talk_that_nobody_can_hear_is_not_an_error(
    monkeypatch: pytest.MonkeyPatch, stream: str | None
) -> None:
    taken = full_stream() if stream == "full" else None
    if stream == "closed":
        taken = io.TextIOWrapper(io.BytesIO())
        taken.close()
    monkeypatch.setattr(sys, "stderr", taken)
    console.say("step 1")
    console.warn("careful")
    if taken is not None:
        taken.close()


def test_letters_that_the_output_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    content, stream = ascii_stream()
    monkeypatch.setattr(sys, "stdout", stream)
    console.show("caf\xe9 — \udc80")
    assert content.getvalue() == b"caf\\xe9 \\u2014 \\udc80\n"
    content, stream = ascii_stream()
    monkeypatch.setattr(sys, "stderr", stream)
    console.say("caf\xe9")
    assert content.getvalue() == b"caf\\xe9\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_stays_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    value = {"prompt": "caf\xe9 — \U0001f600 \udc80"}
    console.show_json(value)
    assert json.loads(content.getvalue().decode(encoding)) == value
