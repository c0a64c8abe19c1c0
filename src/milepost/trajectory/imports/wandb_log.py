"""The records of a run-*.wandb file, which wandb writes offline.

The file is a log in the form of LevelDB's: seven bytes that name it, then blocks of 32 KiB of
chunks, each with a checksum, a length and its place in a record. Newer versions of wandb have no
reader of it in Python.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

MAGIC = b":W&B"
BLOCK_BYTES = 32 << 10

_FILE_HEAD = struct.Struct("<4sHB")
_CHUNK_HEAD = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class WandbLog:
    """Reads one file's records in order.

    Attributes:
        num_damaged: places where a block's rest, or the file's, could not be read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_damaged = 0

    def records(self) -> Iterator[bytes]:
        """Each record that is whole and whose checksums hold, as serialized by wandb."""
        record: bytes | None = None
        for kind, data in self._chunks():
            if kind in (_WHOLE, _FIRST):
                record = data
            elif record is not None and kind in (_MIDDLE, _LAST):
                record += data
            else:
                record = None
            if record is not None and kind in (_WHOLE, _LAST):
                yield record
                record = None

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        """Chunks by their kind; 0 stands for one that is damaged, which breaks its record."""
        block, start = self._file.read(BLOCK_BYTES), _FILE_HEAD.size
        while len(block) > start:
            place = start
            # What is left of a block and too short for a head is padding.
            while len(block) - place >= _CHUNK_HEAD.size:
                checksum, length, kind = _CHUNK_HEAD.unpack_from(block, place)
                place += _CHUNK_HEAD.size
                data = block[place : place + length]
                place += length
                if len(data) < length or zlib.crc32(bytes([kind]) + data) != checksum:
                    self.num_damaged += 1
                    yield 0, b""
                    break
                yield kind, data
            block, start = self._file.read(BLOCK_BYTES), 0
