"""Lines across a benchmark's panel: what guessing gives, and what others were scored at.

A baseline that would flatten the curves is named at the edge of the axis, with an arrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.trajectory.figures.drawing import PLACEHOLDERS
from milepost.trajectory.figures.strokes import Stroke

MAX_STRETCH = 0.7
"""How much further than the curves a baseline may stretch the axis, in ranges of the curves."""

MIN_RANGE = 0.04
"""Of accuracy; curves that move less than this do not fill an axis."""

LETTER_WIDTH, LINE_HEIGHT = 5.4, 12.0
"""Of a name, in units of the drawing area, on average."""

_DASHES: dict[str, tuple[float, ...]] = {"chance": (1, 2), "majority": (6, 2, 1, 2)}
_BASELINE_DASHES = (1.3, 1.6)


@dataclass(frozen=True)
class Level:
    """An accuracy that does not change with the steps.

    Attributes:
        name: "chance", "majority", or the baseline's.
    """

    name: str
    value: float
    is_baseline: bool

    def __str__(self) -> str:
        """'chance 25.0 %'"""
        return f"{self.name} {100 * self.value:.1f} %"


@dataclass(frozen=True)
class _Box:
    """Where a name stands, in units from the bottom left of the axes."""

    left: float
    right: float
    bottom: float
    top: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def holds(self, points: np.ndarray) -> int:
        """How many of [N, 2] points lie in it."""
        inside = (points > [self.left, self.bottom]) & (points < [self.right, self.top])
        return int(inside.all(axis=1).sum())


def set_range(axes: Any, strokes: Sequence[Stroke], levels: Sequence[Level]) -> None:
    """The vertical axis: all curves with their errors, and the levels that do not flatten them."""
    spread = [
        stroke.curve.values + sign * np.nan_to_num(stroke.curve.stderrs)
        for stroke in strokes
        for sign in (-1, 1)
    ]
    values = np.concatenate(spread)
    low, high = float(values.min()), float(values.max())
    reach = MAX_STRETCH * max(high - low, MIN_RANGE)
    # What guessing gives is always drawn: a score means nothing without it.
    near = [v.value for v in levels if not v.is_baseline or low - reach <= v.value <= high + reach]
    bottom, top = min([low, *near]), max([high, *near])
    margin = 0.1 * max(top - bottom, MIN_RANGE)
    bottom, top = bottom - margin, top + margin
    # A row of its own for each name at an edge.
    row = LINE_HEIGHT / axes.bbox.height * (top - bottom)
    above = row * sum(level.value > top for level in levels)
    below = row * sum(level.value < bottom for level in levels)
    axes.set_ylim(bottom - below, top + above)


def draw_levels(axes: Any, levels: Sequence[Level], strokes: Sequence[Stroke]) -> None:
    """The lines with their names; the axis must have its range."""
    low, high = axes.get_ylim()
    within = [level for level in levels if low <= level.value <= high]
    taken = _name_those_beyond(axes, [level for level in levels if level not in within])
    points = np.concatenate(
        [np.stack([s.line.x, s.line.y], axis=1)[~np.isnan(s.line.y)] for s in strokes]
    )
    to_units = axes.transData.transform(points) - [axes.bbox.x0, axes.bbox.y0]
    for level in sorted(within, key=lambda level: (level.is_baseline, level.value)):
        color = PLACEHOLDERS["ink" if level.is_baseline else "muted"]
        dashes = _BASELINE_DASHES if level.is_baseline else _DASHES[level.name]
        axes.axhline(level.value, color=color, linewidth=1, dashes=dashes)
        taken.append(_name_level(axes, level, levels=within, points=to_units, taken=taken))


def _name_those_beyond(axes: Any, levels: Sequence[Level]) -> list[_Box]:
    """Names with an arrow, a row each: what lies above at the top left, below at the bottom."""
    width, height = axes.bbox.width, axes.bbox.height
    top = float(axes.get_ylim()[1])
    boxes = []
    for is_above in (True, False):
        rows = [level for level in levels if (level.value > top) is is_above]
        rows.sort(key=lambda level: level.value, reverse=is_above)
        for number, level in enumerate(rows):
            words = f"{'↑' if is_above else '↓'} {level}"
            edge = number * LINE_HEIGHT
            bottom = height - edge - LINE_HEIGHT if is_above else edge
            left = 0.0 if is_above else width - LETTER_WIDTH * len(words)
            box = _Box(left, left + LETTER_WIDTH * len(words), bottom, bottom + LINE_HEIGHT)
            _write(axes, words, box, is_right=not is_above, is_above=True, is_baseline=True)
            boxes.append(box)
    return boxes


def _name_level(
    axes: Any, level: Level, *, levels: Sequence[Level], points: np.ndarray, taken: Sequence[_Box]
) -> _Box:
    """Writes the name above or below its line, at the end where it hides least."""
    low, high = axes.get_ylim()
    width, height = axes.bbox.width, axes.bbox.height
    y, *lines = ((v.value - low) / (high - low) * height for v in (level, *levels))
    length = LETTER_WIDTH * len(str(level))

    def box(is_right: bool, is_above: bool) -> _Box:
        left = width - length if is_right else 0.0
        bottom = y if is_above else y - LINE_HEIGHT
        return _Box(left, left + length, bottom, bottom + LINE_HEIGHT)

    def cost(place: tuple[bool, bool]) -> tuple[float, ...]:
        found = box(*place)
        is_cut = found.bottom < 0 or found.top > height
        num_met = sum(found.meets(other) for other in taken)
        num_crossed = sum(found.bottom < other < found.top for other in lines if other != y)
        return (is_cut + num_met, num_crossed, found.holds(points))

    # Of equals the first: chance below its line, the others above, at the right end.
    usual = level.name != "chance"
    places = [(is_right, is_above) for is_above in (usual, not usual) for is_right in (True, False)]
    is_right, is_above = min(places, key=cost)
    found = box(is_right, is_above)
    _write(
        axes, str(level), found,
        is_right=is_right, is_above=is_above, is_baseline=level.is_baseline,
    )  # fmt: skip
    return found


def _write(
    axes: Any, words: str, box: _Box, *, is_right: bool, is_above: bool, is_baseline: bool
) -> None:
    width, height = axes.bbox.width, axes.bbox.height
    axes.annotate(
        words,
        (
            (box.right if is_right else box.left) / width,
            (box.bottom if is_above else box.top) / height,
        ),
        xycoords="axes fraction",
        xytext=(0, 2 if is_above else -2),
        textcoords="offset points",
        ha="right" if is_right else "left",
        va="bottom" if is_above else "top",
        size=9.5,
        color=PLACEHOLDERS["ink" if is_baseline else "muted"],
        # A curve may pass here: it stays to be seen, and the name to be read.
        bbox={"facecolor": PLACEHOLDERS["paper"], "alpha": 0.7, "linewidth": 0, "pad": 0.8},
    )
