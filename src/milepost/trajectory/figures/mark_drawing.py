"""Marks of restarts, hardware, refusals, checkpoints and world size on the axes of a panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.trajectory.figures.drawing import PLACEHOLDERS
from milepost.trajectory.figures.marks import Mark, Span, marks_of, refusals_of, spans_of
from milepost.trajectory.figures.scale import Scale, StepPlaces
from milepost.trajectory.subject import Subject

LETTER_WIDTH = 6.2
"""Of the labels above the axes, in units of the drawing area, on average; on a phone, where
style.css makes letters larger."""

DASHES = {"restart": (3, 2.5), "hardware": (9, 2, 2, 2), "rollback": (1, 1.5)}
"""Of the lines of marks, by their kind."""

SKIP_HEIGHT = 0.985
"""Of the marks of skipped batches, in the axes' own height."""

BAND_TOP, BAND_BOTTOM = -0.022, -0.056
"""Of the world size, under the axes, in their height."""


@dataclass(frozen=True)
class AxisMarks:
    """What stands on the axes of every panel: steps, and where they lie."""

    marks: list[Mark]
    spans: list[Span]
    checkpoints: list[int]
    places: StepPlaces

    @property
    def has_band(self) -> bool:
        """Whether the world size changes; one that does not is told, not drawn."""
        return len(self.spans) > 1


def axis_marks_of(subject: Subject, *, scale: Scale) -> AxisMarks:
    """The marks of the main course."""
    run = subject.run
    return AxisMarks(
        marks=[*marks_of(subject), *refusals_of(subject)],
        spans=spans_of(run) if run else [],
        checkpoints=[checkpoint.step for checkpoint in run.checkpoints] if run else [],
        places=StepPlaces(subject.course, axis=scale.axis),
    )


def draw_marks(axes: Any, marks: AxisMarks) -> None:
    """All marks; the horizontal axis must have its range."""
    _draw_lines(axes, marks)
    _draw_skips(axes, marks)
    _draw_checkpoints(axes, marks)
    if marks.has_band:
        _draw_band(axes, marks)


def _draw_lines(axes: Any, marks: AxisMarks) -> None:
    room = axes.bbox.width
    to_axes = axes.transData + axes.transAxes.inverted()
    # The change of a machine is named before a plain restart that has no room beside it.
    taken: list[tuple[float, float]] = []
    lines = [mark for mark in marks.marks if mark.kind != "skip"]
    placed = zip(lines, marks.places.at(mark.step for mark in lines), strict=True)
    for mark, x in sorted(placed, key=lambda pair: (pair[0].kind == "restart", pair[0].step)):
        if not np.isfinite(x):
            continue
        axes.axvline(
            x,
            color=PLACEHOLDERS["mark"],
            linewidth=1 if mark.kind == "restart" else 1.4,
            dashes=DASHES[mark.kind],
            zorder=1,
        )
        half = LETTER_WIDTH * len(mark.label) / 2 / room
        place = float(to_axes.transform((x, 1.0))[0])
        center = min(max(place, half), 1 - half)
        is_free = all(center + half < low or center - half > high for low, high in taken)
        if is_free and 0 <= place <= 1:
            taken.append((center - half, center + half))
            axes.text(
                center,
                1.025,
                mark.label,
                transform=axes.transAxes,
                ha="center",
                color=PLACEHOLDERS["mark"],
                size=9.5,
            )


def _draw_skips(axes: Any, marks: AxisMarks) -> None:
    places = marks.places.at(mark.step for mark in marks.marks if mark.kind == "skip")
    if len(places):
        axes.plot(
            places,
            np.full(len(places), SKIP_HEIGHT),
            transform=axes.get_xaxis_transform(),
            color=PLACEHOLDERS["mark"],
            linestyle="none",
            marker="v",
            markersize=4,
            clip_on=False,
            gid="skips",
        )


def _draw_checkpoints(axes: Any, marks: AxisMarks) -> None:
    places = marks.places.at(marks.checkpoints)
    # In the axes' own height, whatever the values: 0 is the horizontal axis. One path for all of
    # them, broken by NaN: a path a tick would be most of the page of a long run.
    x = np.repeat(places, 3)
    y = np.tile([0.0, 0.035, np.nan], len(places))
    across = axes.get_xaxis_transform()
    # Many ticks stay apart only if they are thin.
    width = min(1.2, 150 / max(1, len(places)))
    axes.plot(x, y, transform=across, color=PLACEHOLDERS["tick"], linewidth=width, gid="ticks")


def _draw_band(axes: Any, marks: AxisMarks) -> None:
    """The world size under the axis, the darker the more ranks."""
    shades = band_shades(marks.spans)
    steps = [step for span in marks.spans for step in (span.first_step, span.last_step)]
    edges = np.clip(marks.places.at(steps), *axes.get_xlim())
    for number, ranks in enumerate(shades):
        boxes = [
            (first, last - first)
            for first, last, span in zip(edges[::2], edges[1::2], marks.spans, strict=True)
            if span.ranks == ranks and np.isfinite(last - first)
        ]
        axes.broken_barh(
            boxes,
            (BAND_BOTTOM, BAND_TOP - BAND_BOTTOM),
            transform=axes.get_xaxis_transform(),
            color=PLACEHOLDERS["tick"],
            alpha=shades[ranks],
            linewidth=0,
            clip_on=False,
            gid=f"ranks{number}",
        )
    axes.tick_params(axis="x", pad=13)


def band_shades(spans: Sequence[Span]) -> dict[int, float]:
    """Opacity of the band by number of ranks, fewest first."""
    counts = sorted({span.ranks for span in spans})
    step = 0.6 / max(1, len(counts) - 1)
    return {count: round(0.25 + step * place, 3) for place, count in enumerate(counts)}
