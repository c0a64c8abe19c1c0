"""Blocks: the parts of source files that workers take, cut the same way every time.

A block is lines of one file, a row range of one table, or some whole text files. Where it is
cut depends on the sources alone, never on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from milepost.data.document import (
    MAX_DOCUMENT_BYTES,
    Problem,
    RawDocument,
    parse_lines,
    parse_row,
    parse_text,
)
from milepost.data.sources import SourceFile

BLOCK_BYTES = 4 << 20
READ_BYTES = 1 << 20
BATCH_ROWS = 256


@dataclass(frozen=True)
class Unit:
    """Source files that are cut into blocks together: one large file, or some small texts.

    Attributes:
        files: (number in the list of all sources, file).
        split: where its documents go: "train", "validation", or "by_fraction".
    """

    files: tuple[tuple[int, SourceFile], ...]
    split: str

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(file.size_bytes for _, file in self.files)


@dataclass(frozen=True)
class Block:
    """One part of a unit.

    Attributes:
        file_number: of the file the lines or rows are from.
        first_line: number of its first line or row.
        data: complete lines.
        row_groups: of the table at `path`, where it is one.
        texts: (file number, path) of whole text files.
        problem: what is wrong after all that.
        position_bytes: bytes of the unit's files read when it was cut.
    """

    file_number: int
    first_line: int = 1
    data: bytes = b""
    path: Path | None = None
    row_groups: tuple[int, ...] = ()
    texts: tuple[tuple[int, Path], ...] = ()
    problem: Problem | None = None
    position_bytes: int = field(default=0, compare=False)


def make_units(files: list[tuple[int, SourceFile]], *, split: str) -> list[Unit]:
    """Units in the order of the files; neighboring text files share one."""
    units: list[Unit] = []
    texts: list[tuple[int, SourceFile]] = []

    def close_texts() -> None:
        if texts:
            units.append(Unit(tuple(texts), split))
            texts.clear()

    for number, file in files:
        if file.kind != "text" or file.hub is not None:
            close_texts()
            units.append(Unit(((number, file),), split))
            continue
        texts.append((number, file))
        if sum(text.size_bytes for _, text in texts) >= BLOCK_BYTES:
            close_texts()
    close_texts()
    return units


def read_blocks(unit: Unit, *, paths: dict[int, Path]) -> Iterator[Block]:
    """The blocks of a unit in order.

    Args:
        unit: what to cut.
        paths: where each of its files lies.
    """
    number, file = unit.files[0]
    if file.kind == "text":
        texts = tuple((number, paths[number]) for number, _ in unit.files)
        yield Block(number, texts=texts, position_bytes=unit.size_bytes)
    elif file.size_bytes == 0:
        yield Block(number, problem=Problem(1, "empty_file", "is empty"))
    elif file.kind == "parquet":
        yield from _table_blocks(number, paths[number], file.size_bytes)
    else:
        yield from _line_blocks(number, paths[number], file.compression)


def documents_of(block: Block, *, text_field: str) -> Iterator[tuple[int, RawDocument | Problem]]:
    """(file number, document or problem) of everything in a block, in order."""
    for number, path in block.texts:
        yield number, _text_document(path)
    if block.data:
        parsed = parse_lines(block.data, first_line=block.first_line, text_field=text_field)
        yield from ((block.file_number, item) for item in parsed)
    if block.path is not None:
        yield from ((block.file_number, item) for item in _rows(block, text_field))
    if block.problem is not None:
        yield block.file_number, block.problem


def _text_document(path: Path) -> RawDocument | Problem:
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            return _too_long(1)
        return parse_text(path.read_bytes())
    except OSError as error:
        return Problem(1, "damaged_file", f"cannot be read: {error.strerror}")


def _too_long(line: int) -> Problem:
    return Problem(line, "too_long", f"is longer than {MAX_DOCUMENT_BYTES >> 20} MiB")


def _line_blocks(number: int, path: Path, compression: str | None) -> Iterator[Block]:
    cutter = _LineCutter(number)
    try:
        with path.open("rb") as raw:
            stream = _decompressed(raw, compression)
            while data := _read_fully(stream, READ_BYTES):
                yield from cutter.feed(data, raw.tell())
            yield from cutter.finish(raw.tell())
    except (OSError, EOFError) as error:  # what pyarrow and the disk raise
        line = cutter.next_line
        problem = Problem(line, "damaged_file", f"cannot be read from here on: {error}")
        yield from cutter.cut()
        yield Block(number, first_line=line, problem=problem)


def _decompressed(raw: IO[bytes], compression: str | None) -> Any:
    if compression is None:
        return raw
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression)


def _read_fully(stream: Any, size: int) -> bytes:
    """As much as asked for, unless the stream ends: where blocks are cut hangs on it."""
    parts: list[bytes] = []
    while size and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _LineCutter:
    """Collects lines and cuts a block when it holds enough of them."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._first_line = 1
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._position_bytes = 0
        self._is_too_long = False
        self.next_line = 1

    def feed(self, data: bytes, position_bytes: int) -> Iterator[Block]:
        """Takes the next bytes of the file."""
        self._position_bytes = position_bytes
        head, newline, tail = data.rpartition(b"\n")
        if not newline:
            self._keep(data)
            return
        first_bytes = head.find(b"\n") if b"\n" in head else len(head)
        if self._is_too_long or self._rest_bytes + first_bytes > MAX_DOCUMENT_BYTES:
            yield from self._end_too_long_line()
            complete = head[first_bytes + 1 :] + newline if first_bytes < len(head) else b""
        else:
            complete = b"".join([*self._rest, head, newline])
        self._rest, self._rest_bytes = [], 0
        self._keep(tail)
        if complete:
            self._lines.append(complete)
            self._num_bytes += len(complete)
            self.next_line += complete.count(b"\n")
        if self._num_bytes >= BLOCK_BYTES:
            yield from self.cut()

    def _keep(self, data: bytes) -> None:
        self._rest_bytes += len(data)
        if self._rest_bytes > MAX_DOCUMENT_BYTES:
            self._is_too_long = True
            self._rest = []
        elif data:
            self._rest.append(data)

    def _end_too_long_line(self) -> Iterator[Block]:
        yield from self.cut()
        line = self.next_line
        yield Block(self._number, first_line=line, problem=_too_long(line))
        self._is_too_long = False
        self.next_line += 1
        self._first_line = self.next_line

    def finish(self, position_bytes: int) -> Iterator[Block]:
        """Ends the file: a last line may lack its line feed."""
        self._position_bytes = position_bytes
        if self._is_too_long:
            yield from self._end_too_long_line()
        elif self._rest:
            self._lines += self._rest
        yield from self.cut()

    def cut(self) -> Iterator[Block]:
        """Closes the block that is being collected."""
        if self._lines:
            data = b"".join(self._lines)
            yield Block(
                self._number,
                first_line=self._first_line,
                data=data,
                position_bytes=self._position_bytes,
            )
        self._lines, self._num_bytes, self._first_line = [], 0, self.next_line


def _table_blocks(number: int, path: Path, size_bytes: int) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            groups = [table.metadata.row_group(g) for g in range(table.metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (pyarrow.ArrowException, OSError) as error:
        what = f"cannot be read as Parquet: {error}"
        yield Block(number, problem=Problem(1, "damaged_file", what))
        return
    if not sum(rows for rows, _ in sizes):
        yield Block(number, problem=Problem(1, "empty_file", "has no rows"))
        return
    taken: list[int] = []
    taken_bytes, row, first_row = 0, 1, 1
    for group, (num_rows, num_bytes) in enumerate(sizes):
        taken.append(group)
        taken_bytes, row = taken_bytes + num_bytes, row + num_rows
        if taken_bytes >= BLOCK_BYTES or group == len(sizes) - 1:
            yield Block(
                number,
                first_line=first_row,
                path=path,
                row_groups=tuple(taken),
                position_bytes=size_bytes * (group + 1) // len(sizes),
            )
            taken, taken_bytes, first_row = [], 0, row


def _rows(block: Block, text_field: str) -> Iterator[RawDocument | Problem]:
    import pyarrow
    import pyarrow.parquet

    assert block.path is not None
    row = block.first_line
    try:
        # Read bit by bit: a row group can be as large as its file.
        options = {"pre_buffer": False, "buffer_size": READ_BYTES}
        with pyarrow.parquet.ParquetFile(block.path, **options) as table:
            num_rows = sum(table.metadata.row_group(g).num_rows for g in block.row_groups)
            names = table.schema_arrow.names
            if text_field not in names:
                what = f"has no column {text_field!r}; its columns are {', '.join(names)}"
                yield Problem(row, "text_missing", what, count=num_rows)
                return
            columns = [name for name in (text_field, "id") if name in names]
            batches = table.iter_batches(
                BATCH_ROWS, row_groups=list(block.row_groups), columns=columns
            )
            for batch in batches:
                texts = _plain(batch.column(text_field))
                ids = _plain(batch.column("id")) if "id" in columns else [None] * len(texts)
                for text, own_id in zip(texts, ids, strict=True):
                    yield _row_document(row, text, own_id, text_field)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        yield Problem(row, "damaged_file", f"cannot be read from here on: {error}")


def _row_document(row: int, text: Any, own_id: Any, text_field: str) -> RawDocument | Problem:
    if isinstance(text, bytes) and len(text) > MAX_DOCUMENT_BYTES:
        return _too_long(row)
    return parse_row(row, text=text, own_id=own_id, text_field=text_field)


def _plain(column: Any) -> list[Any]:
    """Python values of a column, texts as bytes: Arrow does not check that they are UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) in ("string", "large_string", "string_view"):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
