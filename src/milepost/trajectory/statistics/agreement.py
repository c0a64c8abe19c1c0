"""How far raters agree: Krippendorff's alpha, each rater with themselves, and who is milder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from milepost.runs.ratings import CRITERIA, RaterKind
from milepost.trajectory.statistics.alpha import krippendorff_alpha
from milepost.trajectory.statistics.correlation import Interval
from milepost.trajectory.statistics.resampling import mean_interval

AVERAGE = "average"
"""In the place of a criterion: the mean of all of them."""

COLUMNS = (*CRITERIA, AVERAGE)


@dataclass(frozen=True)
class Rater:
    """All that one rater said.

    Attributes:
        name: who.
        kind: what.
        scores: sample_id to repeat to float64[C], the scores of `COLUMNS`, none missing.
    """

    name: str
    kind: RaterKind
    scores: dict[str, dict[int, np.ndarray]]

    def means(self) -> dict[str, np.ndarray]:
        """sample_id to the mean over its repeats."""
        return {
            sample: np.mean([*repeats.values()], axis=0) for sample, repeats in self.scores.items()
        }

    def firsts(self) -> dict[str, np.ndarray]:
        """sample_id to the score that was given first."""
        return {sample: repeats[min(repeats)] for sample, repeats in self.scores.items()}


@dataclass(frozen=True)
class AgreementRow:
    """How far ratings of the same samples are alike.

    Attributes:
        raters: whose, in words: "people (3 raters)", "Ann, first and second time", "people and
            gpt-4o".
        kind: between raters of one kind, of one rater with themselves, or of people, as their
            mean, with one model.
        criterion: of `runs.ratings.CRITERIA`, or "average".
        num_samples: rated at least twice among these ratings.
        num_raters: at least 1.
        alpha: Krippendorff's, taking scores as numbers (interval data).
        interval: 95 %, by a bootstrap over the samples; None where there are too few, or
            where all resamples give the same.
        ordinal_alpha: the same, taking only the order of the scores.
        exact_fraction: of pairs of ratings of one sample that are equal.
        mean_difference: mean of their absolute differences, in points.
        absence: why there is no alpha, in words; None where there is one.
    """

    raters: str
    kind: Literal["people", "models", "self", "people and model"]
    criterion: str
    num_samples: int
    num_raters: int
    alpha: float | None
    interval: Interval | None
    ordinal_alpha: float | None
    exact_fraction: float | None
    mean_difference: float | None
    absence: str | None


@dataclass(frozen=True)
class BiasRow:
    """How much higher one rater scores than others do on the same samples.

    Attributes:
        rater: who.
        rater_kind: "person" or "model".
        others: with whom they are compared, in words: "the other people", "people".
        criterion: of `runs.ratings.CRITERIA`, or "average".
        num_samples: that both rated.
        difference: mean of rater minus others, in points; None where they share no sample.
        interval: 95 %, by a bootstrap over the samples; None where there are too few, or
            where all resamples give the same.
    """

    rater: str
    rater_kind: RaterKind
    others: str
    criterion: str
    num_samples: int
    difference: float | None
    interval: Interval | None


def agreement_rows(people: Sequence[Rater], models: Sequence[Rater]) -> tuple[AgreementRow, ...]:
    """Every comparison that there is, people and models never in one without saying so.

    Between raters the first rating of each counts, since that is what one rating is worth;
    between people and a model the means over people and repeats.

    Returns:
        For each comparison a row for each of `COLUMNS`: people, models where there are several,
        people with each model, each rater with themselves where they saw samples twice.
    """
    rows: list[AgreementRow] = []
    if people:
        told = "one person" if len(people) == 1 else f"people ({len(people)} raters)"
        rows += _rows([person.firsts() for person in people], raters=told, kind="people")
    if len(models) > 1:
        told = f"models ({len(models)})"
        rows += _rows([model.firsts() for model in models], raters=told, kind="models")
    if people:
        of_people = mean_of_raters(people)
        for model in models:
            told = f"people and {model.name}"
            rows += _rows([of_people, model.means()], raters=told, kind="people and model")
    for rater in (*people, *models):
        repeats = sorted({repeat for scores in rater.scores.values() for repeat in scores})
        if any(len(scores) > 1 for scores in rater.scores.values()):
            by_repeat = [_of_repeat(rater, repeat) for repeat in repeats]
            rows += _rows(by_repeat, raters=f"{rater.name}, first and second time", kind="self")
    return tuple(rows)


def bias_rows(people: Sequence[Rater], models: Sequence[Rater]) -> tuple[BiasRow, ...]:
    """Each rater against the others: a person against the other people, a model against people.

    Without people a model is compared with the other models.
    """
    rows: list[BiasRow] = []
    for person in people:
        others = [other for other in people if other is not person]
        rows += _biases(person, others, told="the other people")
    for model in models:
        others = list(people) or [other for other in models if other is not model]
        rows += _biases(model, others, told="people" if people else "the other models")
    return tuple(rows)


def mean_of_raters(raters: Iterable[Rater]) -> dict[str, np.ndarray]:
    """sample_id to the mean over raters, each with the mean over their repeats, float64[C]."""
    by_sample: dict[str, list[np.ndarray]] = {}
    for rater in raters:
        for sample, scores in rater.means().items():
            by_sample.setdefault(sample, []).append(scores)
    return {sample: np.mean(scores, axis=0) for sample, scores in by_sample.items()}


def _of_repeat(rater: Rater, repeat: int) -> dict[str, np.ndarray]:
    return {sample: scores[repeat] for sample, scores in rater.scores.items() if repeat in scores}


def _rows(
    ratings: Sequence[dict[str, np.ndarray]],
    *,
    raters: str,
    kind: Literal["people", "models", "self", "people and model"],
) -> list[AgreementRow]:
    samples = sorted({sample for of_rater in ratings for sample in of_rater})
    missing = np.full(len(COLUMNS), np.nan)
    table_RUC = np.array(
        [[of_rater.get(sample, missing) for sample in samples] for of_rater in ratings]
    )
    is_twice = np.isfinite(table_RUC[:, :, 0]).sum(axis=0) >= 2
    rows = []
    for column, criterion in enumerate(COLUMNS):
        table = table_RUC[:, :, column]
        alpha = krippendorff_alpha(table, metric="interval")
        ordinal = krippendorff_alpha(table, metric="ordinal", num_resamples=0)
        differences = np.concatenate(
            [np.abs(first - second) for first, second in combinations(table, 2)] or [np.array([])]
        )
        differences = differences[np.isfinite(differences)]
        rows.append(
            AgreementRow(
                raters=raters,
                kind=kind,
                criterion=criterion,
                num_samples=int(is_twice.sum()),
                num_raters=1 if kind == "self" else len(ratings),
                alpha=None if isinstance(alpha, str) else alpha.value,
                interval=None if isinstance(alpha, str) else alpha.interval,
                ordinal_alpha=None if isinstance(ordinal, str) else ordinal.value,
                exact_fraction=float((differences == 0).mean()) if len(differences) else None,
                mean_difference=float(differences.mean()) if len(differences) else None,
                absence=alpha if isinstance(alpha, str) else None,
            )
        )
    return rows


def _biases(rater: Rater, others: Sequence[Rater], *, told: str) -> list[BiasRow]:
    own, of_others = rater.means(), mean_of_raters(others)
    shared = sorted(own.keys() & of_others.keys())
    rows = []
    for column, criterion in enumerate(COLUMNS):
        differences = np.array([own[s][column] - of_others[s][column] for s in shared])
        rows.append(
            BiasRow(
                rater=rater.name,
                rater_kind=rater.kind,
                others=told,
                criterion=criterion,
                num_samples=len(shared),
                difference=float(differences.mean()) if shared else None,
                interval=mean_interval(differences),
            )
        )
    return rows
