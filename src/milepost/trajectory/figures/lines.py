"""Lines as they are drawn: short ones as they are, long ones as medians within their range.

The CSV beside each figure keeps every value; nothing here is written to a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_RAW_POINTS = 700
"""More than this many points cannot be told apart in a panel."""

NUM_BINS = 360

MIN_REGULAR_FRACTION = 0.5
"""Of the distances between points; a curve with fewer equal ones has no gaps, only few points."""


@dataclass(frozen=True)
class Line:
    """What a panel draws; NaN breaks the line.

    Attributes:
        x: places on the horizontal axis.
        y: values, or medians of bins.
        low: lowest value of each bin, None where the line is drawn as it is.
        high: highest value of each bin, likewise.
        lone_x: places of points without a neighbour, which a line would not show.
        lone_y: their values.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    lone_x: np.ndarray
    lone_y: np.ndarray


def line_of(x: np.ndarray, y: np.ndarray, *, is_log: bool = False) -> Line:
    """The line to draw through points.

    Args:
        x: places, float64[N], ascending; above zero where `is_log`.
        y: values, float64[N], finite.
        is_log: whether the horizontal axis is logarithmic: bins are then of equal ratio.
    """
    if len(x) > MAX_RAW_POINTS:
        return _binned(x, y, is_log=is_log)
    broken_x, broken_y = _broken_at_gaps(x, y)
    return _line(broken_x, broken_y, low=None, high=None)


def _broken_at_gaps(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A NaN between two points that are more than twice the usual distance apart.

    Where no distance is the usual one, as in published tables, nothing is missing.
    """
    distances = np.diff(x)
    if len(distances) < 2:
        return x, y
    usual = np.median(distances)
    if np.mean(np.isclose(distances, usual)) < MIN_REGULAR_FRACTION:
        return x, y
    gaps = np.flatnonzero(distances > 2 * usual) + 1
    return np.insert(x, gaps, x[gaps]), np.insert(y, gaps, np.nan)


def _binned(x: np.ndarray, y: np.ndarray, *, is_log: bool) -> Line:
    spread = np.geomspace if is_log else np.linspace
    edges = spread(x[0], x[-1], NUM_BINS + 1)
    starts = np.searchsorted(x, edges[1:-1], side="left")
    bins = np.split(y, starts)
    centers = (edges[:-1] + edges[1:]) / 2
    # Whole curves, from the first step to the last: half a bin at either end is otherwise cut.
    centers[0], centers[-1] = x[0], x[-1]
    medians, lows, highs = (
        np.array([reduce(part) if len(part) else np.nan for part in bins])
        for reduce in (np.median, np.min, np.max)
    )
    if is_log:  # early steps lie further apart than a bin is wide: no value is missing there
        filled = ~np.isnan(medians)
        centers, medians, lows, highs = (a[filled] for a in (centers, medians, lows, highs))
    return _line(centers, medians, low=lows, high=highs)


def _line(x: np.ndarray, y: np.ndarray, *, low: np.ndarray | None, high: np.ndarray | None) -> Line:
    absent = np.isnan(np.concatenate([[np.nan], y, [np.nan]]))
    lone = ~absent[1:-1] & absent[:-2] & absent[2:]
    return Line(x, y, low, high, lone_x=x[lone], lone_y=y[lone])
