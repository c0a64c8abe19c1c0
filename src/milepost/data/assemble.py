"""Pieces to shards: whole pieces, in order, until a shard holds enough; then the next."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.errors import DataError
from milepost.core.files import fsync_folder, read_json, storage_errors, write_json
from milepost.data.piece_file import ENDINGS, SplitCounts, read_section
from milepost.data.pieces import PieceFile
from milepost.data.shards import DTYPES, OFFSET_DTYPE, FileRecord, ShardRecord, shard_record
from milepost.data.tokenize import MAX_LISTED_DROPS, SPLITS

SHARD_TOKENS = 1 << 27
"""A shard is closed by the piece that reaches this: 256 MiB in uint16."""


@dataclass(frozen=True)
class Assembled:
    """All shards, and what was dropped."""

    splits: dict[str, list[ShardRecord]]
    drop_counts: dict[str, int]
    drops: list[dict[str, Any]]

    def dropped_lines(self) -> str:
        """The list of drops as JSON lines."""
        return "".join(json.dumps({"v": 1} | drop) + "\n" for drop in self.drops)


def assemble(
    pieces: list[PieceFile], *, out: Path, work: Path, dtype: str, sources: list[dict[str, Any]]
) -> Assembled:
    """Writes the shards of all splits into `out`.

    A shard that an earlier call finished is kept; its pieces are deleted once it is on the
    disk, so that the work needs little more than the size of the result.

    Raises:
        StorageError: `out` cannot be written.
    """
    splits: dict[str, list[ShardRecord]] = {}
    for split in SPLITS:
        splits[split] = []
        for number, group in enumerate(_groups(pieces, split)):
            name = f"{split}-{number:05d}"
            record = work / "shards" / f"{name}.json"
            if not record.exists():
                write_json(record, asdict(_write_shard(out / name, group, split, dtype)))
            for file in group:
                (file.folder / file.piece.files[split]).unlink(missing_ok=True)
            splits[split].append(shard_record(read_json(record, error=DataError)))
    return Assembled(splits=splits, drop_counts=_drop_counts(pieces), drops=_drops(pieces, sources))


def delete_shards(out: Path) -> None:
    """Deletes shards that no manifest names."""
    with storage_errors(out):
        for split in SPLITS:
            for ending in ENDINGS:
                for path in out.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9]{ending}"):
                    path.unlink()


def _groups(pieces: list[PieceFile], split: str) -> Iterator[list[PieceFile]]:
    group: list[PieceFile] = []
    num_tokens = 0
    for file in pieces:
        if split in file.piece.splits:
            group.append(file)
            num_tokens += file.piece.splits[split].num_tokens
        if num_tokens >= SHARD_TOKENS:
            yield group
            group, num_tokens = [], 0
    if group:
        yield group


def _write_shard(path: Path, group: list[PieceFile], split: str, dtype: str) -> ShardRecord:
    counts: list[SplitCounts] = [file.piece.splits[split] for file in group]
    num_tokens = sum(count.num_tokens for count in counts)
    tokens, offsets, documents = (
        _write_file(path.with_name(path.name + ending), _content(group, split, dtype, ending))
        for ending in ENDINGS
    )
    assert tokens.size_bytes == num_tokens * DTYPES[dtype].itemsize
    with storage_errors(path):
        fsync_folder(path.parent)
    return ShardRecord(
        num_tokens=num_tokens,
        num_documents=sum(count.num_documents for count in counts),
        num_bytes=sum(count.num_bytes for count in counts),
        tokens=tokens,
        offsets=offsets,
        documents=documents,
    )


def _content(group: list[PieceFile], split: str, dtype: str, ending: str) -> Iterator[bytes]:
    """The bytes of one file of a shard, piece by piece."""
    before = 0
    for file in group:
        path, counts = file.folder / file.piece.files[split], file.piece.splits[split]
        for data in read_section(path, counts=counts, dtype=dtype, ending=ending):
            if ending == ".offsets":
                starts = np.frombuffer(data, dtype=OFFSET_DTYPE) + np.uint64(before)
                data = starts.astype(OFFSET_DTYPE).tobytes()
            yield data
        before += counts.num_tokens
    if ending == ".offsets":
        yield np.array([before], dtype=OFFSET_DTYPE).tobytes()


def _write_file(path: Path, content: Iterator[bytes]) -> FileRecord:
    """Writes in place: a shard counts only once its record is written."""
    digest = hashlib.sha256()
    size = 0
    with storage_errors(path), path.open("wb") as file:
        for data in content:
            file.write(data)
            digest.update(data)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(name=path.name, size_bytes=size, sha256=digest.hexdigest())


def _drop_counts(pieces: list[PieceFile]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for file in pieces:
        counts.update(file.piece.drop_counts)
    return dict(sorted(counts.items()))


def _drops(pieces: list[PieceFile], sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: Counter[str] = Counter()
    listed = []
    for drop in (drop for file in pieces for drop in file.piece.drops):
        seen[drop["reason"]] += 1
        if seen[drop["reason"]] <= MAX_LISTED_DROPS:
            listed.append(drop | {"file": sources[drop["file"]]["name"]})
    return listed
