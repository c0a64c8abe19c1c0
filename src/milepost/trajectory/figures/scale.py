"""The horizontal axis that all figures of a page share: steps, tokens or FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from milepost.core.units import format_count
from milepost.trajectory.course import Axis, Course
from milepost.trajectory.subject import Subject

LOG_SCALE_FROM_RATIO = 30
"""Where one course goes this many times as far as another, a linear axis shows the other as a
vertical stroke."""

LABELS: dict[Axis, str] = {
    "steps": "training steps",
    "tokens": "tokens seen",
    "flops": "training FLOPs",
}

MISSING: dict[Axis, str] = {
    "steps": "its source gives no steps",
    "tokens": "its source gives no tokens; --tokens-per-step would give them",
    "flops": "its source does not give the model's shape",
}
"""Why a course has no place on an axis."""


@dataclass(frozen=True)
class Scale:
    """Where things lie horizontally.

    Attributes:
        first, last: the range of all courses together, in units of the axis.
        is_log: whether the axis is logarithmic; what lies at 0 is then not drawn.
        left_out: courses without a place on it.
        counts_answers: whether the tokens of all courses are those of answers alone.
    """

    axis: Axis
    first: float
    last: float
    is_log: bool
    left_out: tuple[Course, ...]
    counts_answers: bool

    @property
    def label(self) -> str:
        """What the numbers under the axis are."""
        is_of_answers = self.axis == "tokens" and self.counts_answers
        return "answer tokens seen" if is_of_answers else LABELS[self.axis]

    def tick(self, value: float) -> str:
        """A number under the axis."""
        if self.axis == "flops" and value:
            return f"{value:.3g}".replace("e+", "e")
        if self.axis == "tokens":
            return format_count(value)
        return f"{value:,.0f}"


def scale_of(subject: Subject, *, metrics: Iterable[str]) -> Scale:
    """The axis on which all curves of the given metrics have a place."""
    names = list(metrics)
    ranges = {id(course): _range(course, names, axis=subject.axis) for course in subject.courses}
    of_answers = all(course.counts_answers for course in subject.courses)
    known = [found for found in ranges.values() if found is not None]
    if not known:
        return Scale(subject.axis, 0.0, 0.0, False, subject.courses, of_answers)
    lasts = [last for _, last in known]
    is_log = min(lasts) > 0 and max(lasts) > LOG_SCALE_FROM_RATIO * min(lasts)
    firsts = [first for first, _ in known]
    if is_log:
        firsts = [_first_above_zero(c, names, axis=subject.axis) for c in subject.courses]
    left_out = tuple(c for c in subject.courses if ranges[id(c)] is None)
    return Scale(subject.axis, min(firsts), max(lasts), is_log, left_out, of_answers)


def _positions(course: Course, metrics: list[str], *, axis: Axis) -> np.ndarray:
    found = [course.positions(name, axis=axis) for name in metrics if name in course.curves]
    together = np.concatenate([np.empty(0), *found])
    return together[np.isfinite(together)]


def _range(course: Course, metrics: list[str], *, axis: Axis) -> tuple[float, float] | None:
    positions = _positions(course, metrics, axis=axis)
    return (float(positions.min()), float(positions.max())) if len(positions) else None


def _first_above_zero(course: Course, metrics: list[str], *, axis: Axis) -> float:
    positions = _positions(course, metrics, axis=axis)
    return float(np.min(positions[positions > 0], initial=np.inf))


class StepPlaces:
    """Where the steps of one course lie on an axis, from the curves that know both.

    Between two known steps the place is between theirs; beyond the ends it is in proportion.
    """

    def __init__(self, course: Course, *, axis: Axis) -> None:
        pairs = [
            np.stack([curve.steps, course.positions(name, axis=axis)])
            for name, curve in course.curves.items()
        ]
        together = np.concatenate([np.empty((2, 0)), *pairs], axis=1)
        together = together[:, np.isfinite(together).all(axis=0)]
        self._steps, first_places = np.unique(together[0], return_index=True)
        self._places = together[1][first_places]

    def at(self, steps: Iterable[float]) -> np.ndarray:
        """float64[N] of N steps; NaN where the course says nothing of the axis."""
        wanted = np.array(list(steps), dtype=np.float64)
        if not len(self._steps):
            return np.full(len(wanted), np.nan)
        places = np.interp(wanted, self._steps, self._places)
        last_step, last_place = self._steps[-1], self._places[-1]
        if last_step > 0:
            beyond = wanted > last_step
            places[beyond] = wanted[beyond] * last_place / last_step
        first_step, first_place = self._steps[0], self._places[0]
        if first_step > 0:
            before = wanted < first_step
            places[before] = wanted[before] * first_place / first_step
        return places
