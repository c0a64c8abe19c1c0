"""Scores on the rubric, a table a group of raters, and how far the raters agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milepost.runs.ratings import CRITERIA, RUBRIC
from milepost.trajectory.ratings import RatingSummary, RubricScores
from milepost.trajectory.samples import evenly_spread
from milepost.trajectory.sections.measures import rubric_groups
from milepost.trajectory.sections.text_table import Column, TextTable, numbers
from milepost.trajectory.sections.wording import (
    NONE,
    enumerate_words,
    interval_words,
    plain,
    plural,
    signed,
)
from milepost.trajectory.statistics.agreement import AVERAGE, COLUMNS, AgreementRow, BiasRow
from milepost.trajectory.subject import Section, Subject

_NAMES = (*(criterion.name for criterion in RUBRIC), "Average")


@dataclass(frozen=True)
class Rubric:
    """What the section shows; a table without rows is None.

    Attributes:
        questions: (criterion, what the rater answers); none for scores from elsewhere.
        groups: a table of scores for each group of raters.
        agreement: alpha by criterion.
        absences: of whom there is no alpha, and why.
        biases: who gives more or less than the others.
        left_out: ratings that do not count, in sentences.
    """

    questions: tuple[tuple[str, str], ...]
    groups: tuple[TextTable, ...]
    has_intervals: bool
    is_of_several_kinds: bool
    agreement: TextTable | None
    absences: tuple[str, ...]
    biases: TextTable | None
    left_out: tuple[str, ...]


def rubric_section(subject: Subject) -> Section | None:
    """The section; None where nothing is rated."""
    groups, ratings = rubric_groups(subject), subject.ratings
    if not groups and (ratings is None or not _left_out(ratings)):
        return None
    agreement = () if ratings is None else ratings.agreement
    content = Rubric(
        questions=tuple((c.name, c.question) for c in RUBRIC) if subject.example is None else (),
        groups=tuple(_group_table(group) for group in groups),
        has_intervals=any(interval for group in groups for interval in group.intervals),
        is_of_several_kinds=len({group.rater_kind for group in groups}) > 1,
        agreement=_agreement_table(agreement),
        absences=tuple(_absences(agreement)),
        biases=None if ratings is None else _bias_table(ratings.biases),
        left_out=() if ratings is None else tuple(_left_out(ratings)),
    )
    return Section("rubric", "Rubric", "sections/rubric.jinja", content)


def _group_table(group: RubricScores) -> TextTable:
    places = {step: place for place, step in enumerate(group.steps)}
    shown = evenly_spread(list(group.steps))
    has_counts = any(count is not None for count in group.counts)
    rows = [_group_row(group, places[step], has_counts=has_counts) for step in shown]
    caption = f"Mean scores, 0 to 10, by {group.raters}"
    if len(shown) < len(group.steps):
        caption += f" ({len(shown)} of {len(group.steps)} steps)"
    headings = ("Step", *_NAMES, *(["Samples"] if has_counts else []))
    return TextTable(caption, numbers(*headings), tuple(rows), is_plain=True)


def _group_row(group: RubricScores, place: int, *, has_counts: bool) -> tuple[str, ...]:
    means = [group.means[criterion][place] for criterion in CRITERIA]
    told = [NONE if mean is None else f"{mean:.{_decimals(group)}f}" for mean in means]
    average, interval = f"{group.averages[place]:.2f}", group.intervals[place]
    if interval is not None:
        average += f"\n{interval_words(interval, decimals=2)}"
    count = group.counts[place]
    counts = [NONE if count is None else f"{count:,}"] if has_counts else []
    return (f"{group.steps[place]:,}", *told, average, *counts)


def _decimals(group: RubricScores) -> int:
    """Of the means; a source that prints whole points has no decimals to tell."""
    known = [mean for means in group.means.values() for mean in means if mean is not None]
    return 0 if all(mean == round(mean) for mean in known) else 1


def _agreement_table(rows: Sequence[AgreementRow]) -> TextTable | None:
    by_raters: dict[str, dict[str, AgreementRow]] = {}
    for row in rows:
        by_raters.setdefault(row.raters, {})[row.criterion] = row
    told = [
        (raters, f"{found[AVERAGE].num_samples:,}", *(_alpha(found[name]) for name in COLUMNS))
        for raters, found in by_raters.items()
        if any(row.alpha is not None for row in found.values())
    ]
    if not told:
        return None
    columns = (Column("Between"), *numbers("Samples", *_NAMES))
    return TextTable("Agreement: Krippendorff’s alpha", columns, tuple(told), is_plain=True)


def _alpha(row: AgreementRow) -> str:
    if row.alpha is None:
        return NONE
    lines = [plain(row.alpha, decimals=2)]
    if row.interval is not None:
        lines.append(interval_words(row.interval, decimals=2))
    if row.mean_difference is not None:
        lines.append(f"{row.mean_difference:.1f} apart")
    return "\n".join(lines)


def _absences(rows: Sequence[AgreementRow]) -> list[str]:
    """A sentence for each comparison without alpha; of all criteria together where it is so."""
    found: dict[tuple[str, str], list[str]] = {}
    names = dict(zip(COLUMNS, _NAMES, strict=True))
    for row in rows:
        if row.absence is not None:
            found.setdefault((row.raters, row.absence), []).append(names[row.criterion])
    told = []
    for (raters, reason), criteria in found.items():
        of = "" if len(criteria) == len(COLUMNS) else f" of {enumerate_words(criteria).lower()}"
        told.append(f"No alpha{of} for {raters}: {reason}.")
    return told


def _bias_table(rows: Sequence[BiasRow]) -> TextTable | None:
    by_rater: dict[tuple[str, str], dict[str, BiasRow]] = {}
    for row in rows:
        by_rater.setdefault((row.rater, row.others), {})[row.criterion] = row
    told = [
        (
            f"{rater}\nagainst {others}",
            f"{found[AVERAGE].num_samples:,}",
            *(_bias(found[name]) for name in COLUMNS),
        )
        for (rater, others), found in by_rater.items()
        if any(row.difference is not None for row in found.values())
    ]
    if not told:
        return None
    columns = (Column("Rater"), *numbers("Samples", *_NAMES))
    return TextTable(
        "Points above (+) or below (−) others on the same samples",
        columns,
        tuple(told),
        is_plain=True,
    )


def _bias(row: BiasRow) -> str:
    if row.difference is None:
        return NONE
    told = signed(row.difference, decimals=1)
    return told if row.interval is None else f"{told}\n{interval_words(row.interval, decimals=1)}"


def _left_out(ratings: RatingSummary) -> list[str]:
    told = []
    if ratings.num_incomplete:
        told.append(f"{plural(ratings.num_incomplete, 'rating')} without all criteria")
    if ratings.num_unknown_samples:
        told.append(f"{plural(ratings.num_unknown_samples, 'rated sample')} not of this run")
    if ratings.num_bad_lines:
        told.append(f"{plural(ratings.num_bad_lines, 'line')} that cannot be read")
    return [f"Left out: {enumerate_words(told)}."] if told else []
