"""Scores that others published, as levels to hold a run against.

They were made by another program, on all items; the page says so beside them.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.errors import UsageError
from milepost.core.files import as_storage_error, plain_file
from milepost.core.units import format_count
from milepost.trajectory.benchmarks import METRICS
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.example import packaged_table
from milepost.trajectory.fields import finite, text

USUAL = ("TinyLlama-1.1B (2 T tokens)", "Pythia-1.0B (300 B tokens)")
"""Drawn unless others are asked for; the first is the one of the paper's figure 2."""

FORM = (
    "a baseline file is TOML with [[models]] tables: name, source,"
    ' columns = ["tokens", "eval/hellaswag/acc_norm", ...] and rows of as many numbers'
)

MAX_FILE_BYTES = 1 << 20


def published_baselines() -> list[Course]:
    """The packaged levels, one course a model and number of tokens, each curve of one point."""
    return _baselines(packaged_table("published"), what="published.toml")


def usual_baselines() -> list[Course]:
    """The two of the packaged levels that are drawn unless others are asked for."""
    return [course for course in published_baselines() if course.name in USUAL]


def read_baselines(path: Path) -> list[Course]:
    """The levels of a file in the form of the packaged one.

    Raises:
        UsageError: there is no such file, or it is not of that form.
        StorageError: it cannot be read.
    """
    file = plain_file(path, error=UsageError)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path} is too large for a table of baselines", hint=FORM)
        content = file.read_text(encoding="utf-8")
    except OSError as failure:
        raise as_storage_error(failure, what=str(path), verb="read") from failure
    except UnicodeDecodeError as bad:
        raise UsageError(f"{path} is not text in UTF-8", hint=FORM) from bad
    try:
        table = tomllib.loads(content)
    except tomllib.TOMLDecodeError as bad:
        raise UsageError(f"{path} cannot be read as TOML: {bad}", hint=FORM) from bad
    return _baselines(table, what=str(path))


def _baselines(table: dict[str, Any], *, what: str) -> list[Course]:
    models = table.get("models")
    if not isinstance(models, list) or not models:
        raise UsageError(f"{what} names no models", hint=FORM)
    return [course for model in models for course in _levels(model, what=what)]


def _levels(model: Any, *, what: str) -> list[Course]:
    name, source = _text_in(model, "name", what=what), _text_in(model, "source", what=what)
    columns, rows, notes = (model.get(key, []) for key in ("columns", "rows", "notes"))
    problem = _problem(columns, rows, notes)
    if problem is not None:
        raise UsageError(f"{what}, {name}: {problem}", hint=FORM)
    return [
        Course(
            name=f"{name} ({format_count(row[0])} tokens)",
            source=source,
            curves={
                metric: _point(row[0], value)
                for metric, value in zip(columns[1:], row[1:], strict=True)
            },
            notes=tuple(notes),
            is_baseline=True,
        )
        for row in rows
    ]


def _text_in(model: Any, key: str, *, what: str) -> str:
    value = text(model.get(key)) if isinstance(model, dict) else None
    if not value:
        raise UsageError(f"{what} has a model without a {key}", hint=FORM)
    return value


def _problem(columns: Any, rows: Any, notes: Any) -> str | None:
    """What is wrong with a table of levels, in words; None where nothing is."""
    if not isinstance(columns, list) or len(columns) < 2 or columns[0] != "tokens":
        return 'columns must be "tokens" and at least one metric'
    if not all(text(name) for name in columns) or len(set(columns)) < len(columns):
        return "columns must be texts, each once"
    foreign = [name for name in columns[1:] if not _is_accuracy(name)]
    if foreign:
        return f"{foreign[0]!r} is no accuracy of a benchmark, such as eval/hellaswag/acc_norm"
    if not isinstance(notes, list) or not all(text(note) for note in notes):
        return "notes must be a list of texts"
    if not isinstance(rows, list) or not rows:
        return "there are no rows"
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or len(row) != len(columns):
            return f"row {number} does not have {len(columns)} numbers"
        if any(finite(value) is None for value in row) or row[0] < 0:
            return f"row {number} has something that is not a number: {row}"
        beyond = [score for score in row[1:] if not 0 <= score <= 1]
        if beyond:
            return f"row {number} has a score of {beyond[0]:g}: scores are fractions, 0 to 1"
    return None


def _is_accuracy(metric: str) -> bool:
    parts = metric.split("/")
    return len(parts) == 3 and parts[0] == "eval" and parts[1] != "" and parts[2] in METRICS


def _point(tokens: float, value: float) -> Curve:
    unknown = np.array([np.nan])
    return Curve(unknown, np.array([float(tokens)]), np.array([float(value)]), unknown)
