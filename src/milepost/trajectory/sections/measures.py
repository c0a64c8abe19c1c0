"""What a course measures, as columns of numbers by step that can be set beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from milepost.runs.metric_names import TRAIN_LOSS, VAL_LOSS, benchmark_metric, rubric_metric
from milepost.trajectory.benchmarks import METRICS, NAMES
from milepost.trajectory.course import Course
from milepost.trajectory.ratings import RubricScores
from milepost.trajectory.run_course import AVERAGE, labelled_groups
from milepost.trajectory.sections.wording import (
    benchmark_of,
    decimals_of,
    metric_words,
    value_words,
    with_unit,
)
from milepost.trajectory.subject import Subject

MAX_BENCHMARKS = 12
"""An import may have hundreds."""

MIN_COMMON_STEPS = 3
"""Fewer points have no correlation."""

KNOWN_GROUPS = ("train", "val", "perf", "eval", "rubric", "samples")
"""Of `runs.metric_names`: what stands before the slash."""

STANDARD_BENCHMARKS = ("hellaswag", "heldout")
"""The first that a course has stands in the table beside the loss."""


@dataclass(frozen=True)
class Measure:
    """One column.

    Attributes:
        metric: name of `runs.metric_names`.
        words: inside a sentence.
        heading: of a column.
        values: by step.
        is_between: whether the values lie between measured ones, on the straight line.
    """

    metric: str
    words: str
    heading: str
    values: dict[int, float]
    is_between: bool = False

    @property
    def is_rubric(self) -> bool:
        """Whether it is the average score of a group of raters."""
        return self.metric.startswith("rubric/")

    def told(self, step: int) -> str | None:
        """The value at a step, None where there is none."""
        value = self.values.get(step)
        if value is None:
            return None
        decimals = 2 if self.is_rubric else decimals_of(self.metric, self.values.values())
        return value_words(self.metric, value, decimals=decimals)

    def between(self, steps: Iterable[int]) -> Measure:
        """The values at those of the steps that do not lie outside of the measured ones."""
        known = sorted(self.values)
        inside = sorted(step for step in steps if known and known[0] <= step <= known[-1])
        if not inside:
            return replace(self, values={}, is_between=True)
        found = np.interp(inside, known, [self.values[step] for step in known]).tolist()
        values = dict(zip(inside, found, strict=True))
        return replace(self, values=values, is_between=True)


def rubric_groups(subject: Subject) -> tuple[RubricScores, ...]:
    """The scores of each group of raters; people and models are never one group."""
    if subject.example is not None:
        return (subject.example.rubric,)
    return () if subject.ratings is None else subject.ratings.groups


def rubric_measures(subject: Subject) -> list[Measure]:
    """The average score of each group."""
    groups = labelled_groups(rubric_groups(subject))
    return [_rubric_measure(group, label, is_alone=len(groups) == 1) for group, label in groups]


def loss_measure(course: Course) -> Measure | None:
    """Validation loss, or training loss where there is no validation."""
    metric = next((m for m in (VAL_LOSS, TRAIN_LOSS) if m in course.curves), None)
    return None if metric is None else _measure(course, metric)


def at_steps_of(loss: Measure, other: Measure) -> Measure:
    """The loss at the steps of another measure.

    Where the two have fewer than `MIN_COMMON_STEPS` in common, as the intervals of a recipe may
    have it, the loss is taken from the straight line between the two measurements around each step.
    """
    if len(loss.values.keys() & other.values) >= MIN_COMMON_STEPS:
        return loss
    between = loss.between(other.values)
    return loss if len(between.values) < MIN_COMMON_STEPS else between


def benchmark_measures(course: Course) -> list[Measure]:
    """The main score of each benchmark, in the order of the page."""
    return [_measure(course, metric) for metric in main_scores(course)[:MAX_BENCHMARKS]]


def standard_measure(course: Course) -> Measure | None:
    """The benchmark that stands for all in the table beside the loss."""
    measures = {_benchmark(m.metric): m for m in benchmark_measures(course)}
    named = (measures[name] for name in STANDARD_BENCHMARKS if name in measures)
    return next(named, next(iter(measures.values()), None))


def main_scores(course: Course) -> list[str]:
    """The metric of each benchmark that is told: length-normalized accuracy where there is one."""
    found: dict[str, list[str]] = {}
    for metric in course.curves:
        score = benchmark_of(metric)
        if score is not None:
            found.setdefault(score[0], []).append(score[1])
    known = list(NAMES)
    places = {name: known.index(name) if name in NAMES else len(known) for name in found}
    ordered = sorted(found, key=lambda name: (places[name], name))
    return [benchmark_metric(name, _main_metric(found[name])) for name in ordered]


def other_metrics(course: Course) -> list[str]:
    """Metrics of an import that only its source has a name for."""
    return sorted(name for name in course.curves if name.partition("/")[0] not in KNOWN_GROUPS)


def common_steps(measures: Sequence[Measure]) -> list[int]:
    """Steps at which all of them have a value, ascending."""
    steps = set(measures[0].values) if measures else set()
    for measure in measures[1:]:
        steps &= set(measure.values)
    return sorted(steps)


def _main_metric(names: Sequence[str]) -> str:
    return next((name for name in METRICS if name in names), names[0])


def _benchmark(metric: str) -> str:
    score = benchmark_of(metric)
    return metric if score is None else score[0]


def _measure(course: Course, metric: str) -> Measure:
    curve = course.curves[metric]
    known = np.isfinite(curve.steps)
    steps, values = curve.steps[known].astype(int).tolist(), curve.values[known].tolist()
    return Measure(
        metric, metric_words(metric), with_unit(metric), dict(zip(steps, values, strict=True))
    )


def _rubric_measure(group: RubricScores, label: str, *, is_alone: bool) -> Measure:
    return Measure(
        metric=rubric_metric(label, AVERAGE),
        words="the average score" if is_alone else f"the average score by {group.raters}",
        heading=f"Average score\n{group.raters}",
        values=dict(zip(group.steps, group.averages, strict=True)),
    )
