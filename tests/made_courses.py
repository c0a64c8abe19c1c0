"""Courses that are no runs, of a few points, and the subjects that are made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from milepost.trajectory.course import Course, Curve
from milepost.trajectory.sections.all import Told, tell
from milepost.trajectory.sections.work import work_out
from milepost.trajectory.subject import Subject


def curve(
    steps: Sequence[int], values: Sequence[float], *, tokens_per_step: float = 1000.0
) -> Curve:
    """A curve without standard errors."""
    at = np.array(steps, dtype=np.float64)
    nothing = np.full(len(steps), np.nan)
    return Curve(at, at * tokens_per_step, np.array(values, dtype=np.float64), nothing)


def subject_of(course: Course, *others: Course) -> Subject:
    """A page about the first course."""
    return Subject(course.name, course, None, None, others, (), None, "steps")


def told_by(subject: Subject) -> Told:
    """The summary and the sections of the page."""
    return tell(subject, work_out(subject))
