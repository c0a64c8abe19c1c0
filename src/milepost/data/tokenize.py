"""What a worker does: one block of a source to one piece of token ids, written whole or not."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.errors import DataError
from milepost.core.files import write_json
from milepost.data.blocks import Block, documents_of
from milepost.data.document import HARMLESS_REASONS, Problem, RawDocument
from milepost.data.piece_file import PieceWriter, SplitCounts
from milepost.data.shards import DTYPES
from milepost.text.fast_encoder import FastEncoder, open_fast_encoder
from milepost.text.tokenizer import Tokenizer, load_tokenizer

MAX_LISTED_DROPS = 100
"""So many drops of each reason are listed; all are counted."""

SPLITS = ("train", "validation")
ENCODE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What decides the tokens of a block, equal for all blocks.

    Attributes:
        tokenizer: folder, as `load_tokenizer` takes it.
        tokenizer_sha256: of what lies there.
        dtype: name in `DTYPES`.
        text_field: key or column of the text.
        val_fraction: share of documents that are held out, by the hash of their text.
        skip_bad: drop what cannot be used instead of refusing.
        is_fast: whether the ids come from the fast encoder; they are the same without it.
    """

    tokenizer: str
    tokenizer_sha256: str
    dtype: str
    text_field: str
    val_fraction: float
    skip_bad: bool
    is_fast: bool = False


@dataclass(frozen=True)
class Piece:
    """What one block became.

    Attributes:
        splits: counts by split; a split without documents is absent.
        drop_counts: documents dropped, by reason.
        drops: the first of each reason: file number, line, reason, what, count.
        files: name of each split's file.
    """

    splits: dict[str, SplitCounts]
    drop_counts: dict[str, int]
    drops: list[dict[str, Any]]
    files: dict[str, str]


def read_piece(path: Path) -> Piece | None:
    """The record of a piece that is done, None where it is not."""
    try:
        values = json.loads(path.with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None
    splits = {name: SplitCounts(**counts) for name, counts in values.pop("splits").items()}
    return Piece(splits=splits, **values)


def tokenize_block(
    block: Block, *, path: Path, split: str, settings: Settings, names: dict[int, str]
) -> Piece:
    """Tokenizes a block and writes its piece; the record is written last.

    Args:
        block: what to read.
        path: of the piece, without ending.
        split: "train", "validation" or "by_fraction".
        settings: equal for all blocks.
        names: of the files in the block, for messages.

    Raises:
        DataError: a document cannot be used and `skip_bad` is off.
        StorageError: the piece cannot be written.
    """
    tokenizer = _tokenizer(settings.tokenizer, settings.tokenizer_sha256)
    encoder = (
        fast_encoder(settings.tokenizer, settings.tokenizer_sha256)
        if settings.is_fast
        else tokenizer
    )
    writers: dict[str, PieceWriter] = {}
    problems: list[tuple[int, Problem]] = []
    with contextlib.ExitStack() as stack:
        for batch in _batches(block, settings, names, problems):
            arrays = encoder.encode_batch([document.text for _, document in batch])
            for (number, document), ids in zip(batch, arrays, strict=True):
                name = split if split in SPLITS else split_of(document.text, settings.val_fraction)
                if name not in writers:
                    writer = PieceWriter(path.with_name(f"{path.name}.{name}"))
                    writers[name] = stack.enter_context(writer)
                whole = np.empty(len(ids) + 1, dtype=DTYPES[settings.dtype])
                whole[0], whole[1:] = tokenizer.end_of_text_id, ids
                writers[name].add(whole, number=number, document=document)
    used = [name for name in SPLITS if name in writers]
    piece = Piece(
        splits={name: writers[name].counts for name in used},
        drop_counts=_count(problems),
        drops=_first_of_each(problems),
        files={name: f"{path.name}.{name}" for name in used},
    )
    write_json(path.with_suffix(".json"), asdict(piece))
    return piece


@functools.cache
def _tokenizer(folder: str, sha256: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.sha256 == sha256
    return tokenizer


@functools.cache
def fast_encoder(folder: str, sha256: str) -> FastEncoder:
    """The fast encoder of a tokenizer, opened once a process.

    Raises:
        NoFastEncoderError: there is none.
    """
    return open_fast_encoder(_tokenizer(folder, sha256))


def split_of(text: str, val_fraction: float) -> str:
    """The split of a document: by the hash of its text, so equal texts share it."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "validation" if number < val_fraction * 2.0**64 else "train"


def usable_documents(
    block: Block,
    *,
    text_field: str,
    skip_bad: bool,
    names: dict[int, str],
    problems: list[tuple[int, Problem]],
) -> Iterator[tuple[int, RawDocument]]:
    """(file number, document) of a block; problems are collected, or refused.

    Raises:
        DataError: names the file and line of what cannot be used, when `skip_bad` is off.
    """
    for number, item in documents_of(block, text_field=text_field):
        if isinstance(item, RawDocument):
            yield number, item
        elif skip_bad or item.reason in HARMLESS_REASONS:
            problems.append((number, item))
        else:
            raise DataError(
                f"{names[number]}:{item.line}: {item.what}",
                hint="mend it, or drop such documents with --skip-bad"
                + (", or name the field with --text-field" if "text" in item.reason else ""),
            )


def _batches(
    block: Block, settings: Settings, names: dict[int, str], problems: list[tuple[int, Problem]]
) -> Iterator[list[tuple[int, RawDocument]]]:
    batch: list[tuple[int, RawDocument]] = []
    num_characters = 0
    for item in usable_documents(
        block,
        text_field=settings.text_field,
        skip_bad=settings.skip_bad,
        names=names,
        problems=problems,
    ):
        batch.append(item)
        num_characters += len(item[1].text)
        if num_characters >= ENCODE_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _count(problems: list[tuple[int, Problem]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for _, problem in problems:
        counts[problem.reason] += problem.count
    return dict(sorted(counts.items()))


def _first_of_each(problems: list[tuple[int, Problem]]) -> list[dict[str, Any]]:
    seen: Counter[str] = Counter()
    listed = []
    for number, problem in problems:
        seen[problem.reason] += 1
        if seen[problem.reason] <= MAX_LISTED_DROPS:
            listed.append({"file": number} | asdict(problem))
    return listed
