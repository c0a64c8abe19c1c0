"""Several courses at the same count of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from milepost.core.units import format_count
from milepost.runs.metric_names import BITS_PER_BYTE, TRAIN_LOSS, VAL_LOSS
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.sections.measures import main_scores, other_metrics
from milepost.trajectory.sections.text_table import Column, TextTable, numbers
from milepost.trajectory.sections.wording import (
    NONE,
    decimals_of,
    enumerate_words,
    metric_words,
    value_words,
    with_unit,
)
from milepost.trajectory.subject import Section, Subject

MAX_METRICS = 20


@dataclass(frozen=True)
class Compared:
    """One metric of all courses at one count of tokens.

    Attributes:
        tokens: the largest count at which the most courses have a value.
        values: one a course; None for one that has no value there.
    """

    metric: str
    tokens: float
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Comparison:
    """What the section shows; the table is None where no metric can be compared."""

    table: TextTable | None
    notes: tuple[str, ...]


def compared_metrics(subject: Subject) -> list[Compared]:
    """Each metric that at least two courses have at one count of tokens."""
    found = (_compared(subject.courses, metric) for metric in _shared_metrics(subject.courses))
    return [compared for compared in found if compared is not None]


def comparison_section(subject: Subject, *, compared: Sequence[Compared]) -> Section | None:
    """The section; None for one course."""
    if not subject.others:
        return None
    names = (course.name for course in subject.courses)
    columns = (Column("Metric"), *numbers("At tokens", *names))
    rows = tuple(_row(one) for one in compared)
    table = (
        TextTable("Values at the same count of tokens", columns, rows, is_plain=True)
        if rows
        else None
    )
    content = Comparison(table, tuple(_notes(subject.courses, compared)))
    title = "Courses at the same count of tokens"
    return Section("comparison", title, "sections/comparison.jinja", content)


def value_at(curve: Curve, tokens: float) -> float | None:
    """The value at a count of tokens, on the straight line between the two points around it.

    None outside of the curve: nothing is extrapolated.
    """
    known = np.isfinite(curve.tokens)
    at, values = curve.tokens[known], curve.values[known]
    if not len(at) or not at[0] <= tokens <= at[-1]:
        return None
    return float(np.interp(tokens, at, values))


def _shared_metrics(courses: Sequence[Course]) -> list[str]:
    """What at least two of the courses have; training loss, a noisy value, only for want of all."""
    wanted = [VAL_LOSS, BITS_PER_BYTE]
    for course in courses:
        known = [*main_scores(course), *other_metrics(course)]
        wanted += [metric for metric in known if metric not in wanted]
    shared = [m for m in wanted if sum(m in course.curves for course in courses) > 1]
    has_loss = sum(TRAIN_LOSS in course.curves for course in courses) > 1
    return shared[:MAX_METRICS] or [TRAIN_LOSS] * has_loss


def _compared(courses: Sequence[Course], metric: str) -> Compared | None:
    curves = [course.curves.get(metric) for course in courses]
    ends = [_last_tokens(curve) for curve in curves if curve is not None]
    found = [_at(end, metric, curves) for end in ends if end is not None]
    # Of two counts with as many values one at which the main course has one.
    best = max(
        found, key=lambda c: (_num_values(c), c.values[0] is not None, c.tokens), default=None
    )
    return best if best is not None and _num_values(best) > 1 else None


def _at(tokens: float, metric: str, curves: Sequence[Curve | None]) -> Compared:
    values = tuple(None if curve is None else value_at(curve, tokens) for curve in curves)
    return Compared(metric, tokens, values)


def _num_values(compared: Compared) -> int:
    return sum(value is not None for value in compared.values)


def _row(compared: Compared) -> tuple[str, ...]:
    decimals = decimals_of(compared.metric, (v for v in compared.values if v is not None))
    told = (
        NONE if value is None else value_words(compared.metric, value, decimals=decimals)
        for value in compared.values
    )
    return (with_unit(compared.metric), format_count(compared.tokens), *told)


def _last_tokens(curve: Curve) -> float | None:
    known = curve.tokens[np.isfinite(curve.tokens)]
    return float(known[-1]) if len(known) else None


def _notes(courses: Sequence[Course], compared: Sequence[Compared]) -> Iterator[str]:
    if compared:
        yield (
            "Each row is at the largest count of tokens at which the most courses have a value; one"
            " between two measured points lies on the straight line between them, and nothing is"
            " extrapolated."
        )
    if any(one.metric in (VAL_LOSS, TRAIN_LOSS, BITS_PER_BYTE) for one in compared):
        yield (
            "Nats per token compare models of one tokenizer on one text, bits per byte any models"
            " on one text; whether the texts were the same this page cannot know."
        )
    found = {one.metric for one in compared}
    apart = [metric_words(m) for m in _shared_metrics(courses) if m not in found]
    if apart:
        yield f"At no count of tokens do two courses have a value of {enumerate_words(apart)}."
    if not compared and not apart:
        yield "The courses have no metric in common."
    silent = [c.name for c in courses if not any(map(_has_tokens, c.curves.values()))]
    if silent:
        yield f"How many tokens were seen is not known of {enumerate_words(silent)}."


def _has_tokens(curve: Curve) -> bool:
    return bool(np.isfinite(curve.tokens).any())
