"""What `data.py` works on: files of texts of a wanted size, and a hundred gigabytes of nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from milepost.core.errors import DataError
from milepost.core.files import sha256_of_json, write_json
from milepost.data.blocks import documents_of, make_units, read_blocks
from milepost.data.document import RawDocument
from milepost.data.shards import (
    DTYPES,
    FORMAT,
    MANIFEST,
    OFFSET_DTYPE,
    SCHEMA_VERSION,
    FileRecord,
    ShardRecord,
    fingerprint_of,
)
from milepost.data.sources import find_files

ROW_GROUP_ROWS = 1000
SHARD_TOKENS = 1 << 27
TOKENS_A_DOCUMENT = 1000
FORMS = ("parquet", "jsonl.zst")


def texts_of(source: Path) -> list[str]:
    """All usable texts of a source."""
    files = list(enumerate(find_files([source])))
    units = make_units(files, split="train")
    paths = {number: file.path for number, file in files if file.path is not None}
    blocks = itertools.chain.from_iterable(read_blocks(unit, paths=paths) for unit in units)
    documents = (item for block in blocks for _, item in documents_of(block, text_field="text"))
    texts = [item.text for item in documents if isinstance(item, RawDocument)]
    if not texts:
        raise DataError(f"{source} holds no text", hint="give --source a folder of texts")
    return texts


def write_inputs(texts: list[str], *, folder: Path, megabytes: int) -> dict[str, Path]:
    """The texts, again and again up to the size, as Parquet and as compressed JSON lines."""
    paths = {form: folder / f"texts-{megabytes}.{form}" for form in FORMS}
    schema = pyarrow.schema([("text", pyarrow.large_string()), ("id", pyarrow.string())])
    with (
        pyarrow.parquet.ParquetWriter(paths["parquet"], schema, compression="zstd") as table,
        pyarrow.CompressedOutputStream(str(paths["jsonl.zst"]), "zstd") as lines,
    ):
        for rows in _rows(texts, num_bytes=megabytes * 10**6):
            table.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            lines.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return paths


def _rows(texts: list[str], *, num_bytes: int) -> Iterator[list[dict[str, str]]]:
    """Rows in groups."""
    rows: list[dict[str, str]] = []
    written = 0
    for number, text in enumerate(itertools.cycle(texts)):
        rows.append({"text": text, "id": str(number)})
        written += len(text.encode())
        if len(rows) == ROW_GROUP_ROWS or written >= num_bytes:
            yield rows
            rows = []
        if written >= num_bytes:
            return


def write_sparse_shards(folder: Path, *, num_bytes: int) -> None:
    """Prepared data of that size whose files are holes: it takes no room on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16"
    num_tokens = num_bytes // DTYPES[dtype].itemsize
    shards: list[ShardRecord] = []
    for number, first in enumerate(range(0, num_tokens, SHARD_TOKENS)):
        count = min(SHARD_TOKENS, num_tokens - first)
        num_documents = max(count // TOKENS_A_DOCUMENT, 1)
        sizes = {
            "tokens": count * DTYPES[dtype].itemsize,
            "offsets": (num_documents + 1) * OFFSET_DTYPE.itemsize,
            "documents.jsonl": num_documents * 20,
        }
        files = [_hole(folder / f"train-{number:05d}.{end}", size) for end, size in sizes.items()]
        shards.append(ShardRecord(count, num_documents, 4 * count, *files))
    manifest = _manifest(shards, dtype)
    write_json(folder / MANIFEST, manifest | {"sha256": sha256_of_json(manifest)})


def _hole(path: Path, size: int) -> FileRecord:
    with path.open("wb") as file:
        file.truncate(size)
    # Not the hash of its bytes: opening does not read them, and `verify` is not asked.
    return FileRecord(path.name, size, hashlib.sha256(path.name.encode()).hexdigest())


def _manifest(shards: list[ShardRecord], dtype: str) -> dict[str, Any]:
    tokenizer = "0" * 64
    train = {
        "fingerprint": fingerprint_of(shards, dtype=dtype, tokenizer_sha256=tokenizer),
        "shards": [asdict(shard) for shard in shards],
    }
    return {
        "v": SCHEMA_VERSION,
        "format": FORMAT,
        "dtype": dtype,
        "tokenizer": {"sha256": tokenizer, "vocab_size": 50257, "end_of_text_id": 50256},
        "splits": {"train": train, "validation": None},
        "sources": [],
    }
