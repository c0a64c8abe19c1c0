"""Lines as they are drawn: short ones as they are, long ones as medians within their range.

The CSV beside each figure keeps every value; nothing here is written to a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_RAW_POINTS = 700
"""More than this many points cannot be told apart in a panel."""

NUM_BINS = 360


@dataclass(frozen=True)
class Line:
    """What a panel draws; NaN breaks the line.

    Attributes:
        x: steps.
        y: values, or medians of bins.
        low: lowest value of each bin, None where the line is drawn as it is.
        high: highest value of each bin, likewise.
        lone_x: steps of points without a neighbour, which a line would not show.
        lone_y: their values.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    lone_x: np.ndarray
    lone_y: np.ndarray


def line_of(points: Sequence[tuple[int, float]]) -> Line:
    """The line to draw through (step, value) points in order of step."""
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([value for _, value in points], dtype=np.float64)
    if len(points) > MAX_RAW_POINTS:
        return _binned(steps, values)
    x, y = _broken_at_gaps(steps, values)
    return _line(x, y, low=None, high=None)


def _broken_at_gaps(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A NaN between two points that are more than twice the usual distance apart."""
    distances = np.diff(steps)
    if len(distances) < 2:
        return steps, values
    gaps = np.flatnonzero(distances > 2 * np.median(distances)) + 1
    return np.insert(steps, gaps, steps[gaps]), np.insert(values, gaps, np.nan)


def _binned(steps: np.ndarray, values: np.ndarray) -> Line:
    edges = np.linspace(steps[0], steps[-1], NUM_BINS + 1)
    starts = np.searchsorted(steps, edges[1:-1], side="left")
    bins = np.split(values, starts)
    centers = (edges[:-1] + edges[1:]) / 2
    # Whole curves, from the first step to the last: half a bin at either end is otherwise cut.
    centers[0], centers[-1] = steps[0], steps[-1]
    medians, lows, highs = (
        np.array([reduce(part) if len(part) else np.nan for part in bins])
        for reduce in (np.median, np.min, np.max)
    )
    return _line(centers, medians, low=lows, high=highs)


def _line(x: np.ndarray, y: np.ndarray, *, low: np.ndarray | None, high: np.ndarray | None) -> Line:
    absent = np.isnan(np.concatenate([[np.nan], y, [np.nan]]))
    lone = ~absent[1:-1] & absent[:-2] & absent[2:]
    return Line(x, y, low, high, lone_x=x[lone], lone_y=y[lone])
