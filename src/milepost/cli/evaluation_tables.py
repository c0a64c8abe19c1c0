"""Evaluation records as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len

Line = dict[str, Any]
METRICS = ("acc", "acc_norm")


def tables(lines: Sequence[Line]) -> list[str]:
    """A table a checkpoint; where there are many checkpoints, a table a task."""
    models = {_model_of(line): None for line in lines}
    if len(models) <= 1:
        return [part for model in models for part in _of_model(model, lines)]
    tasks = {line["benchmark"]: None for line in lines}
    return [
        part
        for task in tasks
        for part in _of_task(task, [line for line in lines if line["benchmark"] == task])
    ]


def _of_model(model: str, lines: Sequence[Line]) -> list[str]:
    rows: list[tuple[str, ...]] = [("task", "items", *METRICS, "chance", "majority", "")]
    for line in lines:
        levels = (_fraction(line["chance"]), _fraction(line["majority"]))
        scores = (_score(line, name) for name in METRICS)
        rows.append((line["benchmark"], f"{line['n']:,}", *scores, *levels, _remark(line)))
    return [f"{model}, {_settings(lines)}", *aligned(rows), ""]


def _of_task(task: str, lines: Sequence[Line]) -> list[str]:
    first = lines[0]
    levels = f"chance {_fraction(first['chance'])}, majority {_fraction(first['majority'])}"
    rows: list[tuple[str, ...]] = [("", *METRICS, "")]
    for line in lines:
        scores = (_score(line, name) for name in METRICS)
        rows.append((_model_of(line), *scores, _remark(line)))
    head = f"{task}: {first['n']:,} items, {levels}, {_settings(lines)}"
    return [head, *aligned(rows), ""]


def _model_of(line: Line) -> str:
    return f"step {line['step']}" if line["step"] is not None else "the model"


def _settings(lines: Sequence[Line]) -> str:
    dtypes = {line["dtype"]: None for line in lines}
    shots = {line["num_fewshot"]: None for line in lines}
    return f"{' and '.join(dtypes)}, {' and '.join(map(str, shots))}-shot{_cut(lines)}"


def _cut(lines: Sequence[Line]) -> str:
    """The limit, where it has left something out; a smaller set is whole."""
    cut = [line for line in lines if line["n"] == line["limit"]]
    words = "the first" if len(cut) == len(lines) else "at most the first"
    return "".join(f", {words} {limit:,} items" for limit in {line["limit"]: None for line in cut})


def _score(line: Line, name: str) -> str:
    score = line["metrics"].get(name)
    if score is None:
        return "-"
    error = score["stderr"]
    return _fraction(score["value"]) + ("" if error is None else f" ± {error:.4f}")


def _fraction(value: float) -> str:
    return f"{value:.4f}"


def _remark(line: Line) -> str:
    cut = line["num_truncated"]
    return f"{cut:,} contexts cut to fit" if cut else ""


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns two blanks apart, the first to the left, numbers to the right.

    Widths are those of a terminal, where a Chinese character or an emoji takes two columns.
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + gaps[0]]
        cells += [gap + cell for cell, gap in zip(row[1:-1], gaps[1:-1], strict=True)]
        lines.append("  ".join(["", *cells, row[-1]]).rstrip())
    return lines
