"""What raters said about a run's completions, step by step; people and models apart.

A sample counts for a rater once all criteria have a score, so that every mean is over the same
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from milepost.runs.ratings import CRITERIA, RaterKind, RatingRecord
from milepost.trajectory.fields import whole
from milepost.trajectory.statistics.agreement import (
    AVERAGE,
    COLUMNS,
    AgreementRow,
    BiasRow,
    Rater,
    agreement_rows,
    bias_rows,
    mean_of_raters,
)
from milepost.trajectory.statistics.correlation import Interval
from milepost.trajectory.statistics.resampling import mean_interval


@dataclass(frozen=True)
class RubricScores:
    """The scores of one group of raters against the steps; all tuples of one length.

    Attributes:
        raters: who they are, in words.
        rater_kind: people are never pooled with models; "published" was printed somewhere.
        steps: ascending, each with at least one rated sample.
        means: criterion to its mean at each step; None where the source does not say.
        averages: mean of the criteria at each step.
        intervals: 95 % of the averages, by a bootstrap over the samples of the step; None where
            there are too few of them, or where they are all alike.
        counts: rated samples at each step; None where the source does not say.
    """

    raters: str
    rater_kind: Literal["person", "model", "published"]
    steps: tuple[int, ...]
    means: dict[str, tuple[float | None, ...]]
    averages: tuple[float, ...]
    intervals: tuple[Interval | None, ...]
    counts: tuple[int | None, ...]


@dataclass(frozen=True)
class RatingSummary:
    """All that a run's ratings say.

    Attributes:
        groups: people pooled, then each model by itself; those with a rated step only.
        agreement: how far ratings of the same sample are alike.
        biases: who gives more or less than the others.
        num_unknown_samples: samples that were rated and are not among the run's.
        num_incomplete: times a rater left a sample with some criteria without a score.
        num_bad_lines: lines of the log that could not be read.
    """

    groups: tuple[RubricScores, ...]
    agreement: tuple[AgreementRow, ...]
    biases: tuple[BiasRow, ...]
    num_unknown_samples: int
    num_incomplete: int
    num_bad_lines: int


def summarize_ratings(
    records: Sequence[RatingRecord], samples: Sequence[dict[str, Any]], *, num_bad_lines: int = 0
) -> RatingSummary:
    """Puts the scores of a run together.

    Args:
        records: as `runs.ratings.read_ratings` gives them.
        samples: lines of samples.jsonl.
        num_bad_lines: as `read_ratings` gives it.

    Returns:
        The summary; without a usable rating its tuples are empty.
    """
    raters, num_incomplete = _raters(records)
    people = [rater for rater in raters if rater.kind == "person"]
    models = [rater for rater in raters if rater.kind == "model"]
    known = [sample for sample in samples if isinstance(sample.get("sample_id"), str)]
    steps = {sample["sample_id"]: _step(sample) for sample in known}
    rated = {sample for rater in raters for sample in rater.scores}
    groups = (
        [_scores(people, raters_in_words=_people_in_words(people), steps=steps)] if people else []
    )
    groups += [
        _scores([model], raters_in_words=f"judge {model.name}", steps=steps) for model in models
    ]
    return RatingSummary(
        groups=tuple(group for group in groups if group.steps),
        agreement=agreement_rows(people, models),
        biases=bias_rows(people, models),
        num_unknown_samples=len(rated - steps.keys()),
        num_incomplete=num_incomplete,
        num_bad_lines=num_bad_lines,
    )


def _step(sample: dict[str, Any]) -> int | None:
    """Where the sample stands in the run; None for what a model with an adapter wrote."""
    return whole(sample.get("step")) if sample.get("adapter") is None else None


def _raters(records: Sequence[RatingRecord]) -> tuple[list[Rater], int]:
    """Every rater by name with the samples they scored wholly, and how many they did not."""
    given: dict[tuple[RaterKind, str], dict[tuple[str, int], dict[str, int]]] = {}
    for record in records:
        of_rater = given.setdefault((record.rater_kind, record.rater), {})
        of_rater.setdefault((record.sample_id, record.repeat), {})[record.criterion] = record.score
    raters, num_incomplete = [], 0
    for (kind, name), by_time in sorted(given.items()):
        scores: dict[str, dict[int, np.ndarray]] = {}
        for (sample, repeat), by_criterion in sorted(by_time.items()):
            if len(by_criterion) < len(CRITERIA):
                num_incomplete += 1
                continue
            six = [by_criterion[criterion] for criterion in CRITERIA]
            scores.setdefault(sample, {})[repeat] = np.array([*six, np.mean(six)], dtype=float)
        if scores:
            raters.append(Rater(name, kind, scores))
    return raters, num_incomplete


def _people_in_words(people: Sequence[Rater]) -> str:
    return f"people ({len(people)} {'rater' if len(people) == 1 else 'raters'})"


def _scores(
    raters: Sequence[Rater], *, raters_in_words: str, steps: dict[str, int | None]
) -> RubricScores:
    """The group's means over raters, then over the samples of a step."""
    by_step: dict[int, list[np.ndarray]] = {}
    for sample, scores in sorted(mean_of_raters(raters).items()):
        step = steps.get(sample)
        if step is not None:
            by_step.setdefault(step, []).append(scores)
    found = sorted(by_step)
    means = [np.mean(by_step[step], axis=0) for step in found]
    average = COLUMNS.index(AVERAGE)
    return RubricScores(
        raters=raters_in_words,
        rater_kind=raters[0].kind,
        steps=tuple(found),
        means={
            criterion: tuple(float(mean[column]) for mean in means)
            for column, criterion in enumerate(CRITERIA)
        },
        averages=tuple(float(mean[average]) for mean in means),
        intervals=tuple(
            mean_interval(np.array([scores[average] for scores in by_step[step]])) for step in found
        ),
        counts=tuple(len(by_step[step]) for step in found),
    )
