"""Prepared data: shards of token ids with document offsets, and the manifest that makes a
folder of them whole. Reads only; `prepare` writes.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.errors import DataError, UsageError
from milepost.core.files import read_json, sha256_of_file, sha256_of_json
from milepost.text.tokenizer import Tokenizer, load_tokenizer

SCHEMA_VERSION = 1
FORMAT = "milepost-data"
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET_DTYPE: np.dtype[Any] = np.dtype("<u8")
MAX_OPEN_FILES = 32

_PREPARE_AGAIN = "prepare the data again, or restore the file from a copy"


@dataclass(frozen=True)
class FileRecord:
    """One file of prepared data, by name, size and hash."""

    name: str
    size_bytes: int
    sha256: str

    def path(self, folder: Path) -> Path:
        """Where it lies."""
        return folder / self.name


@dataclass(frozen=True)
class ShardRecord:
    """One shard: its counts and its three files.

    Attributes:
        num_tokens: end-of-text tokens included.
        num_bytes: UTF-8 bytes of the texts.
        tokens: the token ids.
        offsets: uint64 little-endian, the first token of each document in the shard, and the end.
        documents: a JSON line a document: [file, line or row, bytes, id or null].
    """

    num_tokens: int
    num_documents: int
    num_bytes: int
    tokens: FileRecord
    offsets: FileRecord
    documents: FileRecord


@dataclass(frozen=True)
class Document:
    """Where one document lies and what it is.

    Attributes:
        start: its first token (the end-of-text token before it), counted over all shards.
        end: one past its last token.
        source: the file it came from.
        line: its line or row there, from 1.
        num_bytes: UTF-8 bytes of its text.
        id: its own id, None where it has none.
    """

    start: int
    end: int
    source: str
    line: int
    num_bytes: int
    id: str | None

    @property
    def name(self) -> str:
        """Its own id, or its place."""
        return self.id if self.id is not None else f"{self.source}:{self.line}"


def fingerprint_of(shards: list[ShardRecord], *, dtype: str, tokenizer_sha256: str) -> str:
    """The hash that identifies an ordered set of shards."""
    hashes = [shard.tokens.sha256 for shard in shards]
    return sha256_of_json({"dtype": dtype, "tokenizer": tokenizer_sha256, "shards": hashes})


class ShardSet:
    """An ordered set of shards, read as one long sequence of tokens. Safe across threads.

    Attributes:
        fingerprint: identifies the tokens and their order.
        num_tokens, num_documents, num_bytes: sums over the shards.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shards: list[ShardRecord],
        dtype: str,
        fingerprint: str,
        sources: list[str],
    ) -> None:
        self.folder = folder
        self.shards = shards
        self.fingerprint = fingerprint
        self.num_tokens = sum(shard.num_tokens for shard in shards)
        self.num_documents = sum(shard.num_documents for shard in shards)
        self.num_bytes = sum(shard.num_bytes for shard in shards)
        self._dtype = DTYPES[dtype]
        self._sources = sources
        ends = itertools.accumulate(shard.num_tokens for shard in shards)
        self._starts = [0, *ends]
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._documents: dict[int, tuple[np.ndarray, list[list[Any]]]] = {}

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, over shard borders, as uint32.

        Raises:
            DataError: a shard is missing or shorter than its manifest says.
        """
        assert start >= 0 and count >= 0 and start + count <= self.num_tokens
        out = np.empty(count, dtype=np.uint32)
        done = 0
        number = bisect.bisect_right(self._starts, start) - 1
        while done < count:
            begin = start + done - self._starts[number]
            size = min(count - done, self.shards[number].num_tokens - begin)
            out[done : done + size] = self._read_shard(self.shards[number], begin, size)
            done += size
            number += 1
        return out

    def _read_shard(self, shard: ShardRecord, begin: int, count: int) -> np.ndarray:
        width = self._dtype.itemsize
        with self._lock:  # a descriptor may be closed for another one only between reads
            data = self._pread(shard.tokens, count * width, begin * width)
        return np.frombuffer(data, dtype=self._dtype)

    def _pread(self, file: FileRecord, size: int, place: int) -> bytes:
        path = file.path(self.folder)
        try:
            descriptor = self._open(path)
            parts = []
            while size and (part := os.pread(descriptor, size, place)):
                parts.append(part)
                size, place = size - len(part), place + len(part)
            end = os.fstat(descriptor).st_size
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from error
        if size:
            raise _damaged(path, f"ends at byte {end}, not at {file.size_bytes}")
        return b"".join(parts)

    def _open(self, path: Path) -> int:
        name = path.name
        if name in self._descriptors:
            self._descriptors.move_to_end(name)
        else:
            if len(self._descriptors) >= MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[name]

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    @property
    def num_files(self) -> int:
        """Files that `verify` checks."""
        return 3 * len(self.shards)

    def verify(self) -> Iterator[str]:
        """Checks every file of every shard against its size and hash, one a turn.

        Yields:
            The name of each file that is as its manifest says.

        Raises:
            DataError: a shard is missing or its bytes changed; the message names it.
        """
        for shard in self.shards:
            for file in (shard.tokens, shard.offsets, shard.documents):
                verify_file(file, folder=self.folder)
                yield file.name

    def document_at(self, position: int) -> Document:
        """The document that the token at `position` belongs to."""
        return next(self.documents_between(position, position + 1))

    def documents_between(self, start: int, end: int) -> Iterator[Document]:
        """The documents that have tokens in [start, end), in order.

        Raises:
            DataError: the offsets or the names of a shard are missing or damaged.
        """
        assert 0 <= start <= end <= self.num_tokens
        number = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while number < len(self.shards) and self._starts[number] < end:
            first = self._starts[number]
            offsets, lines = self._load_documents(number)
            position = int(np.searchsorted(offsets, max(start - first, 0), side="right")) - 1
            while position < len(lines) and first + offsets[position] < end:
                source, line, num_bytes, own_id = lines[position]
                yield Document(
                    start=first + int(offsets[position]),
                    end=first + int(offsets[position + 1]),
                    source=self._sources[source],
                    line=line,
                    num_bytes=num_bytes,
                    id=own_id,
                )
                position += 1
            number += 1

    def _load_documents(self, number: int) -> tuple[np.ndarray, list[list[Any]]]:
        if number not in self._documents:
            shard = self.shards[number]
            verify_file(shard.offsets, folder=self.folder)
            verify_file(shard.documents, folder=self.folder)
            raw = shard.offsets.path(self.folder).read_bytes()
            offsets = np.frombuffer(raw, dtype=OFFSET_DTYPE).astype(np.int64)
            path = shard.documents.path(self.folder)
            try:
                lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            except (ValueError, RecursionError) as error:
                raise _damaged(path, f"is not JSON lines ({error})") from error
            self._documents = {number: (offsets, lines)}  # one at a time: they may be large
        return self._documents[number]


def verify_file(file: FileRecord, *, folder: Path) -> None:
    """Checks one file against its size and hash.

    Raises:
        DataError: it is missing, of another size, or its bytes changed.
    """
    path = file.path(folder)
    try:
        size = path.stat().st_size
        if size != file.size_bytes:
            raise _damaged(path, f"has {size} bytes, its manifest says {file.size_bytes}")
        if sha256_of_file(path) != file.sha256:
            raise _damaged(path, "has other bytes than its manifest says (sha256)")
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"shard file {path} {what}", hint=_PREPARE_AGAIN)


@dataclass(frozen=True)
class PreparedData:
    """A whole folder of prepared data."""

    folder: Path
    train: ShardSet
    validation: ShardSet | None
    tokenizer_sha256: str
    vocab_size: int
    end_of_text_id: int
    manifest: dict[str, Any]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, from the copy beside them.

        Raises:
            DataError: the copy is missing or changed.
        """
        folder = self.folder / TOKENIZER_FOLDER
        try:
            tokenizer = load_tokenizer(str(folder))
        except UsageError as error:
            raise _damaged(folder / "tokenizer.json", "is missing") from error
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise _damaged(folder / "tokenizer.json", "is not the tokenizer of these shards")
        return tokenizer


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared data, by its manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    values = read_json(path, error=DataError)
    return isinstance(values, dict) and values.get("format") == FORMAT


def open_prepared(folder: Path) -> PreparedData:
    """Opens what `milepost data prepare` wrote.

    Raises:
        DataError: the folder is missing, not finished, or its manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder} holds no prepared data: it has no {MANIFEST}",
            hint=f"run milepost data prepare SOURCE --out {folder}; if it was stopped, "
            "the same command goes on",
        )
    values = read_json(path, error=DataError)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(
            f"{path} is not the manifest of prepared data",
            hint="give the folder that milepost data prepare wrote with --out",
        )
    if values.get("v") != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {values.get('v')}, this program reads {SCHEMA_VERSION}",
            hint="prepare the data again, or use the version of Milepost that wrote it",
        )
    seal = values.pop("sha256", None)  # data of the first versions has none
    if seal is not None and seal != sha256_of_json(values):
        raise DataError(f"{path} is damaged: it does not match its hash", hint=_PREPARE_AGAIN)
    try:
        return _prepared(folder, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error!r}", hint=_PREPARE_AGAIN) from error


def _prepared(folder: Path, values: dict[str, Any]) -> PreparedData:
    splits = values["splits"]
    train = _shard_set(folder, values, splits["train"])
    validation = splits.get("validation")
    return PreparedData(
        folder=folder,
        train=train,
        validation=_shard_set(folder, values, validation) if validation else None,
        tokenizer_sha256=values["tokenizer"]["sha256"],
        vocab_size=values["tokenizer"]["vocab_size"],
        end_of_text_id=values["tokenizer"]["end_of_text_id"],
        manifest=values,
    )


def _shard_set(folder: Path, values: dict[str, Any], split: dict[str, Any]) -> ShardSet:
    shards = [shard_record(shard) for shard in split["shards"]]
    dtype, tokenizer_sha256 = values["dtype"], values["tokenizer"]["sha256"]
    fingerprint = fingerprint_of(shards, dtype=dtype, tokenizer_sha256=tokenizer_sha256)
    if fingerprint != split["fingerprint"]:
        raise DataError(
            f"{folder / MANIFEST}: the fingerprint does not match the shards it lists",
            hint=_PREPARE_AGAIN,
        )
    names = [f.name for s in shards for f in (s.tokens, s.offsets, s.documents)]
    if any("/" in name or name.startswith(".") for name in names):
        raise DataError(f"{folder / MANIFEST} names a file outside its folder")
    for shard in shards:
        for file, num_bytes in (
            (shard.tokens, shard.num_tokens * DTYPES[dtype].itemsize),
            (shard.offsets, (shard.num_documents + 1) * OFFSET_DTYPE.itemsize),
        ):
            if file.size_bytes != num_bytes:
                raise DataError(
                    f"{folder / MANIFEST}: the size of {file.name} does not match its counts",
                    hint=_PREPARE_AGAIN,
                )
    sources = [source["name"] for source in values["sources"]]
    return ShardSet(folder, shards=shards, dtype=dtype, fingerprint=fingerprint, sources=sources)


def shard_record(values: dict[str, Any]) -> ShardRecord:
    """A record from what `dataclasses.asdict` made of it."""
    return ShardRecord(
        num_tokens=int(values["num_tokens"]),
        num_documents=int(values["num_documents"]),
        num_bytes=int(values["num_bytes"]),
        tokens=FileRecord(**values["tokens"]),
        offsets=FileRecord(**values["offsets"]),
        documents=FileRecord(**values["documents"]),
    )
