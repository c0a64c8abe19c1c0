"""The one table of a report: a row a run and step, a column a metric.

The columns are run, step, tokens_seen, flops, segment, ranks, device and is_checkpoint, then the
metrics, each followed by NAME_stderr where standard errors are known. What is not known is null.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.files import write_atomically
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.course import Course, Curve

TABLE_NAME = "trajectory"


def tidy_table(courses: Sequence[Course], *, run: Trajectory | None = None) -> Any:
    """All courses as one pyarrow.Table, in order of course and step.

    A point without a step, such as a published score's, has a row of its own by its tokens.

    Args:
        courses: what the report shows; the first is the run's own where `run` is given.
        run: whose segments, ranks, devices and checkpoints stand in the first course's rows.
    """
    import pyarrow

    metrics: dict[str, bool] = {}
    for course in courses:
        for name, curve in course.curves.items():
            has_error = bool(np.isfinite(curve.stderrs).any())
            metrics[name] = metrics.get(name, False) or has_error
    parts = [
        _part(course, metrics, run=run if number == 0 else None)
        for number, course in enumerate(courses)
    ]
    return pyarrow.concat_tables(parts) if parts else pyarrow.table({})


def write_tidy(table: Any, *, folder: Path, prefix: str = "") -> list[Path]:
    """Writes trajectory.csv and trajectory.parquet; the same table gives the same bytes.

    Args:
        folder: where they go.
        prefix: of their names.

    Raises:
        StorageError: a file cannot be written.
    """
    import pyarrow.csv
    import pyarrow.parquet

    text, binary = io.BytesIO(), io.BytesIO()
    pyarrow.csv.write_csv(table, text)
    pyarrow.parquet.write_table(table, binary, compression="zstd")
    written = []
    for suffix, content in ((".csv", text), (".parquet", binary)):
        written.append(folder / f"{prefix}{TABLE_NAME}{suffix}")
        write_atomically(written[-1], content.getvalue())
    return written


class _Rows:
    """The rows of one course: its steps, then the tokens of points that have no step."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        stepless = [curve.tokens[np.isnan(curve.steps)] for curve in curves]
        every_step = [curve.steps[np.isfinite(curve.steps)] for curve in curves]
        self._steps = np.unique(np.concatenate([np.empty(0), *every_step]))
        self._alone = np.unique(np.concatenate([np.empty(0), *stepless]))
        self.steps = np.concatenate([self._steps, np.full(len(self._alone), np.nan)])
        self.tokens = np.concatenate([np.full(len(self._steps), np.nan), self._alone])
        for curve in curves:
            known = np.isfinite(curve.tokens)
            self.tokens[self._places(curve)[known]] = curve.tokens[known]

    def spread(self, curve: Curve | None, values: np.ndarray | None) -> np.ndarray:
        """Values of a curve by row, float64; NaN where it has none."""
        column = np.full(len(self.steps), np.nan)
        if curve is not None and values is not None:
            column[self._places(curve)] = values
        return column

    def _places(self, curve: Curve) -> np.ndarray:
        by_step = np.searchsorted(self._steps, curve.steps)
        by_tokens = len(self._steps) + np.searchsorted(self._alone, curve.tokens)
        return np.where(np.isnan(curve.steps), by_tokens, by_step)


def _part(course: Course, metrics: dict[str, bool], *, run: Trajectory | None) -> Any:
    import pyarrow

    rows = _Rows(list(course.curves.values()))
    columns: dict[str, Any] = {
        "run": _texts([course.name] * len(rows.steps)),
        "step": _whole_numbers(rows.steps),
        "tokens_seen": _whole_numbers(rows.tokens),
        "flops": _numbers(course.flops(steps=rows.steps, tokens=rows.tokens)),
    }
    columns |= _of_run(run, rows.steps)
    for name, has_error in metrics.items():
        curve = course.curves.get(name)
        values, errors = (curve.values, curve.stderrs) if curve else (None, None)
        columns[_free_name(name, columns)] = _numbers(rows.spread(curve, values))
        if has_error:
            columns[_free_name(f"{name}_stderr", columns)] = _numbers(rows.spread(curve, errors))
    return pyarrow.table(columns)


def _free_name(name: str, columns: dict[str, Any]) -> str:
    """The metric's name; an import may call one as another column is called: "device"."""
    free = _encodable(name)
    while free in columns:
        free += " (metric)"
    return free


def _of_run(run: Trajectory | None, steps: np.ndarray) -> dict[str, Any]:
    """Columns that only a run has; null for other courses."""
    numbers, ranks = np.full(len(steps), np.nan), np.full(len(steps), np.nan)
    devices: list[str | None] = [None] * len(steps)
    saved = np.full(len(steps), np.nan)
    if run is not None:
        for table in (run.validation, run.steps):
            by = dict(zip(table.steps, table.segments, strict=True))
            found = [by.get(step) for step in steps.tolist()]
            numbers = np.where(np.isin(steps, table.steps), np.array(found, np.float64), numbers)
        saved = np.isin(steps, [c.step for c in run.checkpoints]).astype(np.float64)
        for segment in run.segments:
            places = np.flatnonzero(numbers == segment.number)
            ranks[places] = segment.count("ranks") or np.nan
            for place in places.tolist():
                devices[place] = segment.say("device")
    return {
        "segment": _whole_numbers(numbers),
        "ranks": _whole_numbers(ranks),
        "device": _texts(devices),
        "is_checkpoint": _whole_numbers(saved).cast("bool"),
    }


def _numbers(values: np.ndarray) -> Any:
    """float64[N] as a pyarrow array, null where it is not finite."""
    return _array("float64", len(values), np.isfinite(values), values)


def _whole_numbers(values: np.ndarray) -> Any:
    """float64[N] as a pyarrow array of int64, null where it is not finite or has no room there."""
    known = np.abs(values) < 2**63  # false for NaN
    return _array("int64", len(values), known, np.rint(np.where(known, values, 0)).astype(np.int64))


def _texts(texts: Sequence[str | None]) -> Any:
    """Texts as a pyarrow array, null where there is none."""
    content = [_encodable(text or "").encode() for text in texts]
    ends = np.cumsum([0, *map(len, content)]).astype(np.int64)
    known = np.array([text is not None for text in texts], dtype=bool)
    return _array("large_string", len(texts), known, ends, np.frombuffer(b"".join(content), "u1"))


def _array(type_name: str, length: int, known: np.ndarray, *parts: np.ndarray) -> Any:
    """An array of its parts in memory: pyarrow's own constructor imports pandas where it can."""
    import pyarrow

    validity = np.packbits(known, bitorder="little")
    buffers = [pyarrow.py_buffer(part) for part in (validity, *parts)]
    kind = pyarrow.type_for_alias(type_name)
    return pyarrow.Array.from_buffers(kind, length, buffers)


def _encodable(words: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot hold."""
    return words.encode("utf-8", "replace").decode("utf-8")
