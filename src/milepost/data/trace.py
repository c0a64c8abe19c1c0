"""Which documents a step saw, from the shards and the order alone."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.data.loader import Loader, batch_sha256
from milepost.data.shards import Document, ShardSet


@dataclass(frozen=True)
class Span:
    """The part of a document that lies in a row.

    Attributes:
        document: which one.
        position: of its first token in the row, from 0.
        num_tokens: how many of the row's T + 1 tokens are its own.
    """

    document: Document
    position: int
    num_tokens: int


@dataclass(frozen=True)
class TracedRow:
    """One row of a global batch.

    Attributes:
        row: its place in the batch, from 0.
        row_id: its place in the shards, counted in rows.
        start: its first token in the shards.
        spans: the documents in it, in order.
        token_ids: its T + 1 tokens.
    """

    row: int
    row_id: int
    start: int
    spans: list[Span]
    token_ids: list[int]


@dataclass(frozen=True)
class TracedBatch:
    """One global batch with where it came from."""

    data_step: int
    batch_sha256: str
    rows: list[TracedRow]


def trace_batch(
    shards: ShardSet, *, seed: int, data_step: int, rows_per_step: int, sequence_length: int
) -> TracedBatch:
    """The rows of a step's global batch with the documents in them.

    Raises:
        DataError: a shard is missing or damaged, or there are fewer rows than one batch.
    """
    with Loader(
        shards, seed=seed, sequence_length=sequence_length, rows_per_step=rows_per_step
    ) as loader:
        batch = loader.batch(data_step)
        ids = loader.row_ids(data_step)
        rows = [
            _trace_row(shards, row=row, row_id=int(row_id), token_ids=batch[row].tolist())
            for row, row_id in enumerate(ids)
        ]
    return TracedBatch(data_step=data_step, batch_sha256=batch_sha256(batch), rows=rows)


def _trace_row(shards: ShardSet, *, row: int, row_id: int, token_ids: list[int]) -> TracedRow:
    start = row_id * (len(token_ids) - 1)
    end = start + len(token_ids)
    spans = [
        Span(
            document=document,
            position=max(document.start - start, 0),
            num_tokens=min(document.end, end) - max(document.start, start),
        )
        for document in shards.documents_between(start, end)
    ]
    return TracedRow(row=row, row_id=row_id, start=start, spans=spans, token_ids=token_ids)
