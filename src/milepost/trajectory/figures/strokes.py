"""Curves as they are drawn on axes: a look for each course, its name at the line's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.trajectory.course import Course, Curve
from milepost.trajectory.figures.drawing import PLACEHOLDERS
from milepost.trajectory.figures.lines import Line, line_of
from milepost.trajectory.figures.scale import Scale

MAX_COURSES = 6
MAX_MARKED_POINTS = 60
MAX_LABEL_CHARACTERS = 15

MAX_DRAWN = 1e300
"""Where larger values are drawn: the ends of an axis beyond are not finite."""

ROOM_FOR_LABELS = 104
"""Right of the axes, in units of the drawing area, where several courses are drawn."""

LABEL_HEIGHT = 0.085
"""Of the axes: labels nearer to each other than this would overlap."""


@dataclass(frozen=True)
class Look:
    """How a line is drawn; no two of one panel differ by color alone.

    Attributes:
        color: a name of `drawing.PLACEHOLDERS`.
        dashes: on and off, in units of the line's width; empty for a solid line.
        marker: of its points, where they are few.
    """

    color: str
    dashes: tuple[float, ...] = ()
    marker: str = "o"

    @property
    def pattern(self) -> str:
        """The dashes as SVG writes them."""
        return " ".join(f"{2 * length:g}" for length in self.dashes) or "none"


LOOKS = (
    Look("line"),
    Look("course-2", (5, 1.6), "s"),
    Look("course-3", (1.2, 1.2), "^"),
    Look("course-4", (6, 1.6, 1.2, 1.6), "D"),
    Look("course-5", (2.6, 1.3), "v"),
    Look("course-6", (8, 1.6, 1.2, 1.6, 1.2, 1.6), "P"),
)
"""Of the courses of a page, the main one first."""


@dataclass(frozen=True)
class Stroke:
    """A curve with its look.

    Attributes:
        name: of its course, or of what it measures.
        x: places of the curve's points on the axis, float64[N], finite.
        curve: the points that have a place.
        line: what is drawn of them.
    """

    name: str
    look: Look
    x: np.ndarray
    curve: Curve
    line: Line


def stroke_of(
    course: Course, metric: str, *, scale: Scale, look: Look, name: str | None = None
) -> Stroke | None:
    """The curve of a course on an axis; None where none of its points has a place."""
    curve = course.curves.get(metric)
    if curve is None:
        return None
    x = course.positions(metric, axis=scale.axis)
    known = np.isfinite(x) & ((x > 0) | (not scale.is_log))
    if not known.any():
        return None
    kept = Curve(*(a[known] for a in (curve.steps, curve.tokens, curve.values, curve.stderrs)))
    drawn = np.clip(kept.values, -MAX_DRAWN, MAX_DRAWN)
    line = line_of(x[known], drawn, is_log=scale.is_log)
    return Stroke(course.name if name is None else name, look, x[known], kept, line)


def draw_stroke(axes: Any, stroke: Stroke) -> None:
    """The line, the range of its bins, and its points where they are few."""
    line, look = stroke.line, stroke.look
    color = PLACEHOLDERS[look.color]
    if line.low is not None:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
    style: dict[str, Any] = {"dashes": look.dashes} if look.dashes else {}
    if len(stroke.x) <= MAX_MARKED_POINTS:
        style |= {"marker": look.marker, "markersize": 4}
    axes.plot(line.x, line.y, color=color, linewidth=1.6, **style)
    axes.plot(line.lone_x, line.lone_y, look.marker, color=color, markersize=4)


def label_ends(axes: Any, strokes: Sequence[Stroke]) -> None:
    """Names the lines right of the axes, in the order of their ends, none upon another.

    Call it last: the axes must have their range.
    """
    axes.get_ylim()  # settles the range, which the transforms below are made of
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((s.line.x[-1], _last_drawn(s.line))) for s in strokes]
    heights = kept_apart([float(end[1]) for end in ends])
    for stroke, end, height in zip(strokes, ends, heights, strict=True):
        color, name = PLACEHOLDERS[stroke.look.color], stroke.name
        axes.plot(
            [end[0], 1.02, 1.035], [end[1], height, height],
            transform=axes.transAxes, color=color, linewidth=0.7, alpha=0.7, clip_on=False,
        )  # fmt: skip
        if len(name) > MAX_LABEL_CHARACTERS:
            name = name[: MAX_LABEL_CHARACTERS - 1].rstrip() + "…"
        axes.text(
            1.045, height, name,
            transform=axes.transAxes, color=color, va="center", size=9.5,
        )  # fmt: skip


def _last_drawn(line: Line) -> float:
    return float(line.y[~np.isnan(line.y)][-1])


def kept_apart(heights: Sequence[float]) -> list[float]:
    """The heights, moved as little as keeps neighbours `LABEL_HEIGHT` apart, within 0 to 1."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    placed = dict.fromkeys(order, 0.0)
    below = -LABEL_HEIGHT
    for place in order:
        below = placed[place] = max(min(heights[place], 1.0), below + LABEL_HEIGHT, 0.0)
    above = 1.0 + LABEL_HEIGHT
    for place in reversed(order):
        above = placed[place] = min(placed[place], above - LABEL_HEIGHT)
    return [placed[place] for place in range(len(heights))]
