"""What one report is about: the main course, what is laid over it, and what else is on record.

Where the parts of the page agree: the figures are drawn of a `Subject`, and `sections` makes of it
the words above them and a list of `Section` below them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from milepost.trajectory.collect import Trajectory
from milepost.trajectory.course import Axis, Course
from milepost.trajectory.example import Example
from milepost.trajectory.ratings import RatingSummary


@dataclass(frozen=True)
class Subject:
    """All that one page tells.

    Attributes:
        name: the page's heading.
        course: the main one.
        run: what only a run has; None for an example or an import.
        example: None unless the main course is a packaged example.
        others: courses that are laid over the main one, in the order given.
        baselines: published scores, drawn as levels.
        ratings: of the run's samples; None where nothing is rated.
        axis: what the figures are drawn against.
    """

    name: str
    course: Course
    run: Trajectory | None
    example: Example | None
    others: tuple[Course, ...]
    baselines: tuple[Course, ...]
    ratings: RatingSummary | None
    axis: Axis

    @property
    def courses(self) -> tuple[Course, ...]:
        """The main course and those laid over it."""
        return (self.course, *self.others)


@dataclass(frozen=True)
class Section:
    """A part of the page below the figures.

    The page writes the heading (h2) and includes the template with `content` in its context.

    Attributes:
        key: id of its heading; letters and hyphens.
        title: its heading.
        template: in the folder of templates: 'sections/rubric.jinja'.
        content: what the template shows.
    """

    key: str
    title: str
    template: str
    content: Any
