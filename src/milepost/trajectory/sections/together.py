"""Loss, benchmarks and scores side by side, and how far they move together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from milepost.trajectory.samples import evenly_spread
from milepost.trajectory.sections.measures import (
    MIN_COMMON_STEPS,
    Measure,
    at_steps_of,
    benchmark_measures,
    common_steps,
    loss_measure,
    rubric_measures,
    standard_measure,
)
from milepost.trajectory.sections.text_table import Column, TextTable, numbers
from milepost.trajectory.sections.wording import (
    NONE,
    capitalized,
    coefficient_words,
    enumerate_words,
    plain,
)
from milepost.trajectory.statistics.correlation import Correlation, conclusion, correlate
from milepost.trajectory.subject import Section, Subject

MAX_CONCLUSIONS = 6
"""Shown at once; the reader opens the others."""

MANY_PAIRS = 5
"""Beyond, the page says that some intervals miss 0 by chance."""

STEPS = Measure("steps", "training steps", "Steps", {})
"""Stands for the number of steps itself; its values are whatever the other measure has."""

_PRINTED = {"steps": "steps", "val/loss": "validation_loss", "eval/hellaswag/acc_norm": "hellaswag"}
"""Metric to the key of `Example.printed_correlations`."""


@dataclass(frozen=True)
class Pair:
    """Two measures and how they move together."""

    x: Measure
    y: Measure
    correlation: Correlation

    @property
    def name(self) -> str:
        """'HellaSwag and validation loss'"""
        return f"{self.x.words} and {self.y.words}"

    @property
    def fixed(self) -> Measure:
        """The one that stands in several pairs: scores of the rubric, else the loss."""
        return self.y if self.y.is_rubric else self.x

    @property
    def varied(self) -> Measure:
        """The other one."""
        return self.x if self.y.is_rubric else self.y

    @property
    def is_untold(self) -> bool:
        """Whether there are intervals and one of them holds 0."""
        r = self.correlation.pearson
        return r is not None and r.interval is not None and not r.is_told_from_zero


@dataclass(frozen=True)
class Together:
    """What the section shows; a table without rows is None.

    Attributes:
        conclusions: what follows from the pairs; those beyond the first few come after.
        caution: what all of them are subject to.
        is_between: whether a loss was taken from between its measurements.
        printed: what an example's source prints of the same; empty for anything else.
    """

    values: TextTable | None
    note: str
    coefficients: TextTable | None
    conclusions: tuple[str, ...]
    more_conclusions: tuple[str, ...]
    caution: str
    is_between: bool
    printed: str


def pairs_of(subject: Subject) -> list[Pair]:
    """Scores with steps, loss and benchmarks, then the loss with each benchmark."""
    benchmarks, rated = benchmark_measures(subject.course), rubric_measures(subject)
    loss = loss_measure(subject.course)
    pairs = []
    for scores in rated:
        with_loss = [] if loss is None else [at_steps_of(loss, scores)]
        pairs += [_pair(x, scores) for x in (STEPS, *with_loss, *benchmarks)]
    if loss is not None:
        pairs += [_pair(at_steps_of(loss, benchmark), benchmark) for benchmark in benchmarks]
    return pairs


def together_section(subject: Subject, *, pairs: Sequence[Pair]) -> Section | None:
    """The section; None where there is nothing to set side by side."""
    table, note = _values(subject)
    if table is None and not pairs:
        return None
    with_numbers = [pair for pair in pairs if pair.correlation.pearson is not None]
    conclusions = [*_told(with_numbers), *_untold(with_numbers), *_absences(pairs)]
    content = Together(
        values=table,
        note=note,
        coefficients=_coefficients(with_numbers) if with_numbers else None,
        conclusions=tuple(conclusions[:MAX_CONCLUSIONS]),
        more_conclusions=tuple(conclusions[MAX_CONCLUSIONS:]),
        caution=_caution(with_numbers),
        is_between=any(pair.x.is_between for pair in with_numbers),
        printed=_printed(subject, pairs),
    )
    return Section("together", "What moves together", "sections/together.jinja", content)


def _pair(x: Measure, y: Measure) -> Pair:
    steps = sorted(y.values) if x is STEPS else common_steps([x, y])
    at = np.array(steps, dtype=np.float64)
    xs = at if x is STEPS else np.array([x.values[step] for step in steps], dtype=np.float64)
    ys = np.array([y.values[step] for step in steps], dtype=np.float64)
    return Pair(x, y, correlate(xs, ys, steps=at))


def _values(subject: Subject) -> tuple[TextTable | None, str]:
    """Loss, the standard benchmark and the scores at the steps they have in common."""
    loss, standard = loss_measure(subject.course), standard_measure(subject.course)
    beside = [*([standard] if standard else []), *rubric_measures(subject)]
    measures = [*([loss] if loss else []), *beside]
    if len(measures) < 2:
        return None, ""
    steps, notes = common_steps(beside), []
    if len(steps) < MIN_COMMON_STEPS:
        steps = sorted({step for measure in beside for step in measure.values})
    shown = evenly_spread(steps)
    if len(shown) < len(steps):
        notes.append(f"{len(shown)} evenly spread of {len(steps):,} steps.")
    between = loss.between(shown) if loss else None
    rows = []
    for step in shown:
        told = [measure.told(step) for measure in measures]
        if told[0] is None and between is not None and step in between.values:
            told[0] = f"≈ {between.told(step)}"
        rows.append((f"{step:,}", *(cell or NONE for cell in told)))
    if loss and any(row[1].startswith("≈") for row in rows):
        notes.append(
            f"≈: the {loss.words} was not measured at this step; it is taken from the straight line"
            " between the two measurements around it."
        )
    headings = [Column(measure.heading, is_number=True) for measure in measures]
    title = "Loss, benchmark and scores at the same steps"
    columns = (*numbers("Step"), *headings)
    return TextTable(title, columns, tuple(rows), is_plain=True), " ".join(notes)


def _coefficients(pairs: Sequence[Pair]) -> TextTable:
    rows = []
    for pair in pairs:
        c = pair.correlation
        cells = (
            *(c.pearson, c.spearman, c.partial),
            *(c.differences, c.differences_given, c.trend),
        )
        name = f"{capitalized(pair.x.words)}\nwith {pair.y.words}"
        rows.append((name, f"{c.n:,}", *map(coefficient_words, cells)))
    headings = (
        *("n", "Pearson", "Spearman", "Given log(steps)", "Of changes"),
        *("Of changes, given log(steps)", "With log(steps)"),
    )
    return TextTable("Correlations", (Column("Of"), *numbers(*headings)), tuple(rows))


def _told(pairs: Sequence[Pair]) -> list[str]:
    """What follows from each pair of which anything does, without what all are subject to."""
    return [_conclusion_and_caution(pair)[0] for pair in pairs if not pair.is_untold]


def _untold(pairs: Sequence[Pair]) -> list[str]:
    """The pairs whose points do not tell whether they go together, in one sentence a measure."""
    grouped: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.is_untold:
            grouped.setdefault(pair.fixed.words, []).append(pair.varied.words)
    return [
        f"Whether {fixed} goes with {enumerate_words(varied)} these points do not tell: 0 is within"
        " an interval of r, which does not show that there is no relation."
        for fixed, varied in grouped.items()
    ]


def _absences(pairs: Sequence[Pair]) -> list[str]:
    """The pairs without a correlation, in one sentence a measure and reason."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        if pair.correlation.absence is not None:
            key = (pair.fixed.words, pair.correlation.absence)
            grouped.setdefault(key, []).append(pair.varied.words)
    return [
        f"No correlation of {fixed} with {enumerate_words(varied)} can be given: {reason}."
        for (fixed, reason), varied in grouped.items()
    ]


def _caution(pairs: Sequence[Pair]) -> str:
    """What all conclusions are subject to, once, for the fewest points; then how many they are."""
    if not pairs:
        return ""
    _, told = _conclusion_and_caution(min(pairs, key=lambda pair: pair.correlation.n))
    if len(pairs) > MANY_PAIRS:
        told += (
            f" {len(pairs)} correlations are given here: of so many, some may miss 0 by chance"
            " alone."
        )
    return told.strip()


def _conclusion_and_caution(pair: Pair) -> tuple[str, str]:
    """The last sentence of a conclusion that has an interval says how far to trust it."""
    pearson = pair.correlation.pearson
    told = conclusion(pair.correlation, x=pair.x.words, y=pair.y.words)
    head, _, caution = told.rpartition(". ")
    is_parted = pearson is not None and pearson.interval is not None and bool(head)
    return (f"{head}.", caution) if is_parted else (told, "")


def _printed(subject: Subject, pairs: Sequence[Pair]) -> str:
    """What the source of an example prints, against what its own tables give."""
    if subject.example is None:
        return ""
    printed, theirs, ours, alone = subject.example.printed_correlations, [], [], ""
    for pair in pairs:
        key, pearson = _PRINTED.get(pair.x.metric), pair.correlation.pearson
        if key in printed and pair.y.is_rubric and pearson is not None:
            theirs.append(f"{plain(printed[key], decimals=3)} with {pair.x.words}")
            ours.append(plain(pearson.value, decimals=3))
            trend = pair.correlation.trend
            alone = alone if trend is None else plain(trend.value, decimals=3)
    if not ours:
        return ""
    return (
        f"The source prints these correlations of the average score: {', '.join(theirs)}. Its own"
        f" tables give {', '.join(ours)}. The logarithm of the steps alone, which knows nothing of"
        f" the model, gives {alone}."
    )
