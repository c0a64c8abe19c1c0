"""The six panels of the paper's Figure 1, of one course or of several laid over one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.core.units import format_count
from milepost.trajectory.course import Curve
from milepost.trajectory.figures.drawing import Frame, draw_svg, set_scale, tick_text
from milepost.trajectory.figures.hover import Hover, hover_of
from milepost.trajectory.figures.mark_drawing import AxisMarks, axis_marks_of, draw_marks
from milepost.trajectory.figures.marks import marks_in_words
from milepost.trajectory.figures.panel_kinds import PanelKind, panel_kinds_of
from milepost.trajectory.figures.scale import Scale
from milepost.trajectory.figures.strokes import (
    LOOKS,
    ROOM_FOR_LABELS,
    Stroke,
    draw_stroke,
    label_ends,
    stroke_of,
)
from milepost.trajectory.subject import Subject

WIDTH, HEIGHT = 420, 252
"""Units of a panel's drawing area; a panel is about this many pixels wide on a phone."""

LOG_SCALE_FROM_RATIO = 20
"""Where the highest value is this many times the median, a linear axis shows only the spike."""


@dataclass(frozen=True)
class Panel:
    """A panel ready for the page.

    Attributes:
        latest: the main course's last value in words, None where it has none.
        description: the numbers, for those who do not see the drawing.
        svg: the drawing; None where there are no values.
        hover: its points for the page's script, None where there is no drawing.
        is_log_scale: whether its vertical axis is logarithmic.
        is_binned: whether it shows medians within a band instead of every value.
    """

    kind: PanelKind
    latest: str | None
    description: str
    svg: str | None
    hover: Hover | None = None
    is_log_scale: bool = False
    is_binned: bool = False


def draw_panels(subject: Subject, *, scale: Scale) -> list[Panel]:
    """All panels of a page, in the paper's order."""
    marks = axis_marks_of(subject, scale=scale)
    kinds = panel_kinds_of(subject.run)
    return [_panel(kind, subject, scale=scale, marks=marks) for kind in kinds]


def _panel(kind: PanelKind, subject: Subject, *, scale: Scale, marks: AxisMarks) -> Panel:
    strokes = [
        stroke
        for course, look in zip(subject.courses, LOOKS, strict=False)
        if (stroke := stroke_of(course, kind.metric, scale=scale, look=look))
    ]
    if not strokes:
        return Panel(kind, None, f"{kind.title}: {kind.absence}.", svg=None)
    is_log = _needs_log_scale(np.concatenate([stroke.curve.values for stroke in strokes]))
    told = [describe(stroke, text=kind.text) for stroke in strokes]
    if len(subject.courses) > 1:
        told = [f"{s.name}: {words}" for s, words in zip(strokes, told, strict=True)]
    description = " ".join(
        [f"{kind.title} ({kind.unit}), {told[0]}", *told[1:], marks_in_words(marks.marks)]
    ).strip()
    right = {"right": ROOM_FOR_LABELS} if len(subject.courses) > 1 else {}

    def draw(axes: Any) -> None:
        for stroke in strokes:
            draw_stroke(axes, stroke)
        _set_values(axes, kind, is_log_scale=is_log)
        set_scale(axes, scale)
        draw_marks(axes, marks)
        if len(subject.courses) > 1:
            label_ends(axes, strokes)

    drawing = draw_svg(Frame(kind.key, kind.title, description, WIDTH, HEIGHT, **right), draw=draw)
    own = strokes[0] if strokes[0].look is LOOKS[0] else None
    return Panel(
        kind,
        latest=None if own is None else f"{kind.text(own.curve.values[-1])} {at(own.curve, -1)}",
        description=description,
        svg=drawing.svg,
        hover=hover_of(drawing, strokes, text=kind.text),
        is_log_scale=is_log,
        is_binned=any(stroke.line.low is not None for stroke in strokes),
    )


def describe(stroke: Stroke, *, text: Callable[[float], str]) -> str:
    """The numbers of a curve in words: first, lowest, highest, last."""
    curve = stroke.curve

    def told(place: int) -> str:
        return f"{text(curve.values[place])} {at(curve, place)}"

    if len(curve) == 1:
        return f"{told(0)}, the only value."
    lowest, highest = int(np.argmin(curve.values)), int(np.argmax(curve.values))
    return (
        f"{len(curve):,} values: first {told(0)}, lowest {told(lowest)},"
        f" highest {told(highest)}, last {told(-1)}."
    )


def at(curve: Curve, place: int) -> str:
    """Where a point of a curve lies: 'at step 8,750', or its tokens where it has no step."""
    if np.isfinite(curve.steps[place]):
        return f"at step {curve.steps[place]:,.0f}"
    return f"at {format_count(curve.tokens[place])} tokens"


def _needs_log_scale(values: np.ndarray) -> bool:
    return bool(values.min() > 0 and values.max() > LOG_SCALE_FROM_RATIO * np.median(values))


def _set_values(axes: Any, kind: PanelKind, *, is_log_scale: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if is_log_scale:
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        if kind.from_zero:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    form = percent_tick if kind.is_fraction else tick_text
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def percent_tick(value: float) -> str:
    """A share beside an axis: '27.5 %'."""
    return f"{100 * value:.6g} %"
