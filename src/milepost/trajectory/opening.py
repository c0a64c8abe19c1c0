"""Reads what a report is asked for, and makes the subject of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from milepost.core.errors import UsageError
from milepost.runs.ratings import read_ratings
from milepost.trajectory.collect import Trajectory, collect
from milepost.trajectory.course import Axis, Course
from milepost.trajectory.example import load_example
from milepost.trajectory.figures.strokes import MAX_COURSES
from milepost.trajectory.imports.formats import READERS, import_course
from milepost.trajectory.published import read_baselines, usual_baselines
from milepost.trajectory.ratings import RatingSummary, summarize_ratings
from milepost.trajectory.run_course import course_of
from milepost.trajectory.subject import Subject

MAX_TOKENS_PER_STEP = 10**12
PUBLISHED, NO_BASELINE = "published", "none"


@dataclass(frozen=True)
class Request:
    """What one report is asked to show; the first of all is its subject, in this order.

    Attributes:
        runs: run folders.
        example: name of a packaged example.
        imports: 'FORMAT:PATH' texts.
        baseline: `PUBLISHED`, `NO_BASELINE` or the path of a file of levels.
        axis: None for steps where there is one course, tokens where there are several.
        tokens_per_step: of imports that count no tokens.
    """

    runs: tuple[Path, ...]
    example: str | None = None
    imports: tuple[str, ...] = ()
    baseline: str = PUBLISHED
    axis: Axis | None = None
    tokens_per_step: int | None = None


def open_subject(request: Request) -> Subject:
    """Reads all that a request names.

    Raises:
        UsageError: nothing is named, something twice or too much, or it is not what it is said
            to be.
        CheckpointError: a manifest is damaged, or a record is of a later schema.
        StorageError: a file cannot be read.
    """
    _check(request)
    baselines = _baselines(request.baseline)
    example = None if request.example is None else load_example(request.example)
    runs = [collect(folder) for folder in request.runs]
    ratings = [ratings_of(run) for run in runs]
    courses = [course_of(run, ratings=r) for run, r in zip(runs, ratings, strict=True)]
    courses += [example.course] if example else []
    courses += [
        _imported(spec, tokens_per_step=request.tokens_per_step) for spec in request.imports
    ]
    first, *others = _named_apart(courses)
    return Subject(
        name=first.name,
        course=first,
        run=runs[0] if runs else None,
        example=example if not runs else None,
        others=tuple(others),
        baselines=baselines,
        ratings=ratings[0] if ratings else None,
        axis=request.axis or ("tokens" if others else "steps"),
    )


def subject_of_run(run: Trajectory) -> Subject:
    """A run by itself, with the usual baselines."""
    ratings = ratings_of(run)
    course = course_of(run, ratings=ratings)
    baselines = tuple(usual_baselines())
    return Subject(run.name, course, run, None, (), baselines, ratings, "steps")


def ratings_of(run: Trajectory) -> RatingSummary | None:
    """What raters said about the run's samples; None where nobody did.

    Raises:
        StorageError: the log is there and cannot be read.
    """
    records, num_bad = read_ratings(run.layout.ratings)
    if not records and not num_bad:
        return None
    return summarize_ratings(records, run.samples, num_bad_lines=num_bad)


def _check(request: Request) -> None:
    number = len(request.runs) + (request.example is not None) + len(request.imports)
    if not number:
        raise UsageError(
            "nothing to report on",
            hint="name a run folder, --example paper, or --import FORMAT:PATH",
        )
    if number > MAX_COURSES:
        raise UsageError(
            f"{number} trajectories are more than a figure can tell apart",
            hint=f"name at most {MAX_COURSES}",
        )
    places = [path.resolve() for path in request.runs]
    for path, place in zip(request.runs, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{path} is named twice", hint="name each run once")
    for spec in request.imports:
        if request.imports.count(spec) > 1:
            raise UsageError(f"--import {spec} is given twice", hint="name each import once")
    if request.tokens_per_step is not None:
        if not 1 <= request.tokens_per_step <= MAX_TOKENS_PER_STEP:
            raise UsageError(
                f"--tokens-per-step is {request.tokens_per_step}, not 1 to {MAX_TOKENS_PER_STEP:,}"
            )
        if not request.imports:
            raise UsageError(
                "--tokens-per-step without an --import",
                hint="runs and examples say themselves how many tokens a step has",
            )


def _baselines(baseline: str) -> tuple[Course, ...]:
    if baseline == NO_BASELINE:
        return ()
    if baseline == PUBLISHED:
        return tuple(usual_baselines())
    path = Path(baseline)
    if not path.exists():
        raise UsageError(
            f"--baseline {baseline}: there is no such file",
            hint=f"give {PUBLISHED}, {NO_BASELINE} or a TOML file of levels",
        )
    return tuple(read_baselines(path))


def _imported(spec: str, *, tokens_per_step: int | None) -> Course:
    format, colon, path = spec.partition(":")
    if not colon or not format or not path:
        raise UsageError(
            f"--import {spec} does not say both format and path",
            hint=f"write FORMAT:PATH, with one of the formats {', '.join(READERS)}",
        )
    return import_course(format, Path(path), tokens_per_step=tokens_per_step)


def _named_apart(courses: Sequence[Course]) -> list[Course]:
    """The courses, those of one name numbered, so that no two lines have the same."""
    given, taken, apart = {course.name for course in courses}, set[str](), []
    for course in courses:
        name, number = course.name, 1
        while name in taken or (number > 1 and name in given):
            number += 1
            name = f"{course.name} ({number})"
        taken.add(name)
        apart.append(replace(course, name=name))
    return apart
