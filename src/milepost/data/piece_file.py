"""The file of one split of a piece: tokens, then where each document starts, then its line.

It is written in place, part by part, so that a block of any size takes little memory: a piece
counts only once its record is written.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from milepost.core.files import fsync_folder, storage_errors
from milepost.data.document import RawDocument
from milepost.data.shards import DTYPES, OFFSET_DTYPE

WRITE_TOKENS = 1 << 21
READ_BYTES = 4 << 20

ENDINGS = (".tokens", ".offsets", ".documents.jsonl")
"""The sections of the file, by the shard's file that each becomes a part of."""


@dataclass(frozen=True)
class SplitCounts:
    """Counts of one split of a piece."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0


class PieceWriter:
    """Writes one split of a piece; leave the block, and it is on the disk.

    Raises:
        StorageError: at every use, when the disk is full, read-only or failing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checksum = 0
        self._tokens: list[np.ndarray] = []
        self._waiting_tokens = 0
        self._starts: list[int] = []
        self._lines: list[str] = []
        self._num_tokens = 0
        self._num_bytes = 0

    @property
    def counts(self) -> SplitCounts:
        """Of all that was added."""
        return SplitCounts(self._num_tokens, len(self._starts), self._num_bytes)

    def add(self, ids: np.ndarray, *, number: int, document: RawDocument) -> None:
        """Adds the ids of a document of the file of that number; not copied."""
        own_id = "null" if document.id is None else json.dumps(document.id)
        self._lines.append(f"[{number}, {document.line}, {document.num_bytes}, {own_id}]\n")
        self._starts.append(self._num_tokens)
        self._num_bytes += document.num_bytes
        self._num_tokens += len(ids)
        self._tokens.append(ids)
        self._waiting_tokens += len(ids)
        if self._waiting_tokens >= WRITE_TOKENS:
            self._write_tokens()

    def _write_tokens(self) -> None:
        self._write(b"".join(map(np.ndarray.tobytes, self._tokens)))
        self._tokens, self._waiting_tokens = [], 0

    def _write(self, data: bytes) -> None:
        with storage_errors(self._path):
            self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)

    def __enter__(self) -> Self:
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_whole = False
        try:
            with storage_errors(self._path), self._file:
                if error is None:
                    self._finish()
                    is_whole = True
        finally:
            if not is_whole:  # what is left of it would only fill the disk
                self._path.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._write_tokens()
        self._write(np.array(self._starts, dtype=OFFSET_DTYPE).tobytes())
        self._write("".join(self._lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        fsync_folder(self._path.parent)
        checksum = 0
        with self._path.open("rb") as written:
            while data := written.read(READ_BYTES):
                checksum = zlib.crc32(data, checksum)
        if checksum != self._checksum:  # a write that fell short without an error
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def read_section(path: Path, *, counts: SplitCounts, dtype: str, ending: str) -> Iterator[bytes]:
    """One section of the file, part by part; parts hold whole offsets.

    Args:
        path: of the file.
        counts: as `PieceWriter.counts` was.
        dtype: name in `DTYPES`.
        ending: one of `ENDINGS`.
    """
    token_bytes = counts.num_tokens * DTYPES[dtype].itemsize
    offset_bytes = counts.num_documents * OFFSET_DTYPE.itemsize
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = [0, token_bytes, token_bytes + offset_bytes, size]
        section = ENDINGS.index(ending)
        file.seek(ends[section])
        left = ends[section + 1] - ends[section]
        while data := file.read(min(left, READ_BYTES)):
            yield data
            left -= len(data)
