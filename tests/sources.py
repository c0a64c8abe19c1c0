"""Sources of every kind with the same texts, and what was prepared from them read back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from milepost.data.prepare import PrepareSummary, prepare
from milepost.data.shards import open_prepared

TEXTS = ["First text.", "Second text, with “quotes”.\r\nAnd lines.", "Third <|endoftext|> text"]


def run(source: Path, out: Path, **options: Any) -> PrepareSummary:
    return prepare([source], out=out, **({"tokenizer": "gpt2"} | options))


def texts_of(out: Path) -> list[str]:
    """The texts, cut at the control token and not where a text only looks like it."""
    data = open_prepared(out)
    tokenizer = data.tokenizer()
    documents = data.train.documents_between(0, data.train.num_tokens)
    ids = [data.train.read(d.start, d.end - d.start).tolist() for d in documents]
    assert all(i[0] == data.end_of_text_id and data.end_of_text_id not in i[1:] for i in ids)
    return [tokenizer.decode(i[1:]) for i in ids]


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != ".lock"}


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_jsonl(path: Path) -> None:
    path.write_bytes(lines_of(TEXTS))


def write_gzip(path: Path) -> None:
    members = [gzip.compress(lines_of(TEXTS[:1])), gzip.compress(lines_of(TEXTS[1:]))]
    path.write_bytes(b"".join(members))


def write_zstd(path: Path) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(lines_of(TEXTS[:2]))
    first = path.read_bytes()
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(lines_of(TEXTS[2:]))
    path.write_bytes(first + path.read_bytes())


def write_parquet(path: Path) -> None:
    """The columns of FineWeb-Edu."""
    table = pyarrow.table(
        {
            "text": TEXTS,
            "id": ["<urn:uuid:1>", "<urn:uuid:2>", "<urn:uuid:3>"],
            "dump": ["CC-MAIN-2024-10"] * 3,
            "url": ["http://example.org"] * 3,
            "score": [3.1, 2.9, 4.0],
            "token_count": [3, 9, 10],
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def numbered(path: Path, *, count: int = 60) -> Path:
    path.write_bytes(lines_of([f"text number {number}" for number in range(count)]))
    return path
