"""A table of step and metrics as text, with commas, semicolons or tabs between the columns."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from milepost.core.errors import UsageError
from milepost.core.files import storage_errors
from milepost.trajectory.course import Course
from milepost.trajectory.imports.names import STEP_NAMES, step_name
from milepost.trajectory.imports.points import (
    Points,
    enumerate_some,
    left_out,
    refuse_several_runs,
)
from milepost.trajectory.imports.sniff import found_at, limit_size, refuse

MAX_FILE_BYTES = 64 << 20
"""Every number is held in memory, at some ten times its length in the file."""

EXPECTED = (
    "a text table whose first line names the columns, one of them the step:"
    f" {', '.join(STEP_NAMES)}"
)

RUN_COLUMN = "run"
"""Which run a row is of, in Milepost's own trajectory.csv."""

_OF_RUNS = frozenset(["segment", "ranks", "flops"])
"""Columns of Milepost's own trajectory.csv that are no metrics."""


@dataclass(frozen=True)
class Header:
    """The first line of a table.

    Attributes:
        columns: their names, in order, each once.
        delimiter: what stands between cells.
    """

    columns: list[str]
    delimiter: str


def read(path: Path, *, name: str | None, tokens_per_step: int | None) -> Course:
    """See `formats.import_course`."""
    header = read_header(path)
    points, run, notes = gather(path, header, names={c: c for c in header.columns})
    return points.course(
        name or run or path.stem,
        source=f"the table {path.name}",
        notes=notes,
        tokens_per_step=tokens_per_step,
    )


def read_header(path: Path) -> Header:
    """The columns of a text table.

    Raises:
        UsageError: it is missing, too large, or no such table.
        StorageError: it cannot be read.
    """
    with storage_errors(path, verb="read"):
        if not path.is_file():
            what = f"{path} is a folder" if path.is_dir() else f"there is nothing at {path}"
            raise UsageError(what, hint=f"expected {EXPECTED}")
    limit_size([path], max_bytes=MAX_FILE_BYTES, what="a table")
    if found_at(path)[0] != "csv":
        raise refuse(path, expected=EXPECTED)
    first = next(_lines(path), "")
    delimiter = max(",;\t", key=first.count)
    columns = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter))]
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise UsageError(
            f"{path} has two columns {twice[0]!r}", hint="give each column a name of its own"
        )
    return Header(columns, delimiter)


def gather(
    path: Path, header: Header, *, names: dict[str, str]
) -> tuple[Points, str | None, list[str]]:
    """The numbers of a table, the run its rows name, and notes on what was left out.

    Args:
        names: of the columns that are taken, to what they are called from here on.

    Raises:
        UsageError: no column is a step, none beside it has a number, or rows are of several runs.
        StorageError: it cannot be read.
    """
    step = step_name(names.values())
    if step is None:
        raise UsageError(
            f"{path} has no column of steps; its columns are {enumerate_some(header.columns)}",
            hint=f"expected {EXPECTED}",
        )
    points, runs, num_bad = Points(), dict[str, None](), 0
    rows = csv.reader(_lines(path), delimiter=header.delimiter)
    next(rows)
    while (cells := _next_row(rows)) is not None:
        if len(cells) != len(header.columns):
            num_bad += bool(cells)
            continue
        texts = dict(zip(header.columns, cells, strict=True))
        if RUN_COLUMN in texts:
            runs[texts[RUN_COLUMN]] = None
        numbers = _numbers(texts, names, has_decimal_comma=header.delimiter == ";")
        points.add_record(numbers, step_name=step)
    refuse_several_runs(path, runs)
    if not points:
        raise UsageError(
            f"{path} has no numbers beside {step}", hint=f"expected {EXPECTED}, and metrics"
        )
    notes = [left_out(num_bad, "row", why="of another length")] if num_bad else []
    return points, next(iter(runs), None), notes


def _lines(path: Path) -> Iterator[str]:
    """Lines of text; a byte that is no UTF-8 does not make the others unreadable."""
    with storage_errors(path, verb="read"):
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            yield from file


def _next_row(rows: Iterator[list[str]]) -> list[str] | None:
    """The next row, one without cells where the line cannot be parsed; None at the end."""
    try:
        return next(rows, None)
    except csv.Error:
        return ["unreadable"]


def _numbers(
    texts: dict[str, str], names: dict[str, str], *, has_decimal_comma: bool
) -> dict[str, float]:
    numbers = {}
    for column, name in names.items():
        cell = texts[column]
        if cell and column not in _OF_RUNS:
            try:
                numbers[name] = float(cell.replace(",", ".") if has_decimal_comma else cell)
            except ValueError:
                continue
    return numbers
