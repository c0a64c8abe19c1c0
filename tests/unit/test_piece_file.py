"""The file of a piece: the same bytes however they are written, whole or not there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from milepost.core.errors import StorageError
from milepost.data import piece_file
from milepost.data.document import RawDocument
from milepost.data.piece_file import ENDINGS, PieceWriter, SplitCounts, read_section

LENGTHS = [3, 1, 4000, 2, 700]
NAMES = ["a", None, 'with "quotes"', "é", None]


def write(path: Path) -> SplitCounts:
    with PieceWriter(path) as writer:
        for number, (length, name) in enumerate(zip(LENGTHS, NAMES, strict=True)):
            ids = np.arange(number, number + length, dtype="<u2")
            document = RawDocument(number + 1, "text", 10 * length, name)
            writer.add(ids, number=7, document=document)
    return writer.counts


def sections(path: Path, counts: SplitCounts) -> list[bytes]:
    return [
        b"".join(read_section(path, counts=counts, dtype="uint16", ending=ending))
        for ending in ENDINGS
    ]


@pytest.mark.parametrize("write_tokens", [1, 1000, 10**6])
@pytest.mark.parametrize("read_bytes", [8, 4096, 10**6])
def test_the_sections_come_back_whatever_is_written_and_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_tokens: int, read_bytes: int
) -> None:
    monkeypatch.setattr(piece_file, "WRITE_TOKENS", write_tokens)
    monkeypatch.setattr(piece_file, "READ_BYTES", read_bytes)
    counts = write(tmp_path / "piece")
    assert counts == SplitCounts(sum(LENGTHS), len(LENGTHS), 10 * sum(LENGTHS))
    tokens, offsets, documents = sections(tmp_path / "piece", counts)
    ids = [np.arange(n, n + length, dtype="<u2") for n, length in enumerate(LENGTHS)]
    assert tokens == np.concatenate(ids).tobytes()
    assert np.frombuffer(offsets, "<u8").tolist() == [0, 3, 4, 4004, 4006]
    rows = [json.loads(line) for line in documents.decode().splitlines()]
    assert rows == [[7, n + 1, 10 * LENGTHS[n], name] for n, name in enumerate(NAMES)]


def test_what_a_kill_left_of_it_is_written_over(tmp_path: Path) -> None:
    whole = sections(tmp_path / "whole", write(tmp_path / "whole"))
    (tmp_path / "piece").write_bytes(b"x" * 100_000)
    assert sections(tmp_path / "piece", write(tmp_path / "piece")) == whole


def test_an_error_in_the_work_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in the work"), PieceWriter(tmp_path / "piece") as writer:
        writer.add(np.zeros(3, "<u2"), number=0, document=RawDocument(1, "a", 1, None))
        raise ValueError("in the work")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["shorter", "other"])
def test_a_disk_that_kept_other_bytes_is_said_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def lose(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            data = path.read_bytes()
            path.write_bytes(data[:-1] if damage == "shorter" else b"x" + data[1:])

    path = tmp_path / "piece"
    monkeypatch.setattr(os, "fsync", lose)
    with pytest.raises(StorageError, match=r"cannot write .*piece"):
        write(path)
    assert list(tmp_path.iterdir()) == []
