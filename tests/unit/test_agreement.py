"""Krippendorff's alpha against published examples and a plain reckoning, and what is made of it."""

from __future__ import annotations

from itertools import permutations
from typing import get_args

import numpy as np
import pytest

from milepost.runs.ratings import CRITERIA, RaterKind
from milepost.trajectory.statistics.agreement import (
    AVERAGE,
    COLUMNS,
    Rater,
    agreement_rows,
    bias_rows,
)
from milepost.trajectory.statistics.alpha import Alpha, Metric, krippendorff_alpha

NONE = np.nan

# K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011). Example A: two observers,
# ten units of 0 and 1. B: two observers, twelve units, the names a to e. C: four observers, twelve
# units, with values missing.
BINARY = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
NAMES = [[1, 1, 2, 2, 4, 3, 3, 3, 5, 4, 4, 1], [2, 1, 2, 2, 2, 3, 3, 3, 5, 4, 4, 4]]
MISSING = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]


@pytest.mark.parametrize(
    ("values", "metric", "printed"),
    [
        (BINARY, "nominal", 0.095),
        (NAMES, "nominal", 0.692),
        (MISSING, "nominal", 0.743),
        (MISSING, "ordinal", 0.815),
        (MISSING, "interval", 0.849),
    ],
)
def test_alpha_is_that_of_the_published_examples(
    values: list[list[float]], metric: Metric, printed: float
) -> None:
    alpha = krippendorff_alpha(np.array(values, dtype=float), metric=metric)

    assert isinstance(alpha, Alpha)
    assert round(alpha.value, 3) == printed
    assert alpha.interval is not None
    assert alpha.interval.low < alpha.value < alpha.interval.high


@pytest.mark.parametrize("metric", get_args(Metric))
def test_alpha_is_that_of_a_plain_sum_over_pairs(metric: Metric) -> None:
    rng = np.random.default_rng(3)
    for num_raters, num_units in ((2, 5), (3, 9), (5, 30)):
        values = rng.integers(0, 11, (num_raters, num_units)).astype(float)
        values[rng.random(values.shape) < 0.3] = NONE
        alpha = krippendorff_alpha(values, metric=metric, num_resamples=0)
        assert isinstance(alpha, Alpha)
        assert alpha.value == pytest.approx(_plain_alpha(values, metric), abs=1e-12)


def _plain_alpha(values: np.ndarray, metric: Metric) -> float:
    """The definition, pair by pair, with the distances as the 2011 text prints them."""
    units = [[v for v in unit if np.isfinite(v)] for unit in values.T]
    units = [unit for unit in units if len(unit) >= 2]
    everything = [v for unit in units for v in unit]
    counts = {v: everything.count(v) for v in sorted(set(everything))}

    def distance(a: float, b: float) -> float:
        if metric == "nominal":
            return float(a != b)
        if metric == "interval":
            return (a - b) ** 2
        between = sum(n for v, n in counts.items() if min(a, b) <= v <= max(a, b))
        return (between - (counts[a] + counts[b]) / 2) ** 2

    within = sum(
        sum(distance(a, b) for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units
    )
    n = len(everything)
    chance = sum(distance(a, b) for a, b in permutations(everything, 2)) / (n * (n - 1))
    return 1 - within / n / chance


def test_alpha_does_not_depend_on_who_is_named_first() -> None:
    values = np.array(MISSING)
    assert krippendorff_alpha(values, metric="ordinal") == krippendorff_alpha(
        values[::-1], metric="ordinal"
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[1, 2, 3]], "one rater only"),
        ([[1, 2, 3], [NONE, NONE, NONE]], "one rater only"),
        ([[1, 2, NONE], [NONE, NONE, 3]], "nothing was rated twice"),
        ([[7, 7, 1], [7, 7, NONE]], "all scores are the same"),
    ],
)
def test_where_there_is_no_alpha_the_reason_is_said(values: list[list[float]], words: str) -> None:
    alpha = krippendorff_alpha(np.array(values, dtype=float), metric="interval")
    assert isinstance(alpha, str)
    assert alpha.startswith(words)


@pytest.mark.parametrize(("num_units", "has_interval"), [(4, False), (5, True)])
def test_few_units_give_no_interval(num_units: int, has_interval: bool) -> None:
    values = np.array([np.arange(num_units), np.arange(num_units) % 3], dtype=float)
    alpha = krippendorff_alpha(values, metric="interval")
    assert isinstance(alpha, Alpha)
    assert (alpha.interval is not None) == has_interval


def test_the_interval_holds_the_alpha_of_all_units_about_as_often_as_it_says() -> None:
    # 200 rounds of 40 units from one known population: at 95 % the share that holds it has a
    # standard deviation of 0.015, and four of them below lies 0.89.
    rng = np.random.default_rng(11)
    truth = rng.normal(5, 2, 20_000)
    all_values = np.round(truth + rng.normal(0, 1, (2, 20_000)))
    whole = krippendorff_alpha(all_values, metric="interval", num_resamples=0)
    assert isinstance(whole, Alpha)
    num_held = 0
    for first in range(0, 200 * 40, 40):
        alpha = krippendorff_alpha(
            all_values[:, first : first + 40], metric="interval", num_resamples=200
        )
        assert isinstance(alpha, Alpha) and alpha.interval is not None
        num_held += alpha.interval.low <= whole.value <= alpha.interval.high
    assert num_held >= 0.89 * 200


def rater(name: str, averages: dict[str, list[float]], *, kind: RaterKind = "person") -> Rater:
    """A rater whose criteria all have the same score, a list of repeats a sample."""
    scores = {
        sample: {repeat: np.full(len(COLUMNS), score) for repeat, score in enumerate(repeats)}
        for sample, repeats in averages.items()
    }
    return Rater(name, kind, scores)


ANN = rater("Ann", {"a": [2, 3], "b": [5], "c": [8, 8], "d": [4]})
BOB = rater("Bob", {"a": [3], "b": [6], "c": [9], "e": [1]})
MODEL = rater("m1", {"a": [4, 4], "b": [6, 6], "c": [7, 7], "d": [5, 5]}, kind="model")


def test_people_and_models_are_never_in_one_row_that_does_not_say_so() -> None:
    rows = agreement_rows([ANN, BOB], [MODEL])
    assert [(row.kind, row.raters) for row in rows if row.criterion == AVERAGE] == [
        ("people", "people (2 raters)"),
        ("people and model", "people and m1"),
        ("self", "Ann, first and second time"),
        ("self", "m1, first and second time"),
    ]
    assert [row.criterion for row in rows[: len(COLUMNS)]] == [*CRITERIA, AVERAGE]


def test_agreement_between_people_is_of_first_ratings_of_shared_samples() -> None:
    row = agreement_rows([ANN, BOB], [])[-2 * len(COLUMNS)]
    assert (row.num_samples, row.num_raters) == (3, 2)
    assert row.exact_fraction == 0
    assert row.mean_difference == pytest.approx(1.0)  # 2 and 3, 5 and 6, 8 and 9
    plain = _plain_alpha(np.array([[2, 5, 8], [3, 6, 9]], dtype=float), "interval")
    assert row.alpha == pytest.approx(plain)


def test_self_agreement_compares_the_two_times() -> None:
    row = next(r for r in agreement_rows([ANN], []) if r.kind == "self")
    assert (row.num_samples, row.num_raters) == (2, 1)
    assert row.exact_fraction == 0.5
    assert row.mean_difference == 0.5


def test_one_person_has_a_row_that_says_why_there_is_no_alpha() -> None:
    row = agreement_rows([BOB], [])[0]
    assert (row.raters, row.alpha, row.absence) == ("one person", None, "one rater only")
    assert row.exact_fraction is None


def test_people_and_a_model_are_compared_by_their_means() -> None:
    rows = agreement_rows([ANN, BOB], [MODEL])
    row = next(r for r in rows if r.kind == "people and model")
    # People: a (2.5 + 3) / 2, b 5.5, c 8.5, d 4, e 1 (which the model did not see).
    differences = [4 - 2.75, 6 - 5.5, 8.5 - 7, 5 - 4]
    assert row.num_samples == 4
    assert row.mean_difference == pytest.approx(np.mean(differences))


def test_a_milder_rater_has_a_bias_above_zero() -> None:
    rows = {(r.rater, r.criterion): r for r in bias_rows([ANN, BOB], [MODEL])}
    assert rows["Bob", AVERAGE].difference == pytest.approx(np.mean([0.5, 1, 1]))
    assert rows["Ann", AVERAGE].difference == -rows["Bob", AVERAGE].difference
    assert rows["m1", "depth"].others == "people"
    assert rows["m1", "depth"].difference == pytest.approx(np.mean([1.25, 0.5, -1.5, 1]))
    assert rows["m1", "depth"].interval is None


def test_a_lone_rater_has_no_bias() -> None:
    (row,) = (r for r in bias_rows([ANN], []) if r.criterion == AVERAGE)
    assert (row.num_samples, row.difference, row.interval) == (0, None, None)


def test_bias_has_an_interval_where_enough_samples_are_shared() -> None:
    samples = {f"s{n}": [float(n % 7)] for n in range(40)}
    milder = {sample: [score[0] + int(sample[1:]) % 2] for sample, score in samples.items()}
    row = bias_rows([rater("Ann", samples), rater("Bob", milder)], [])[-1]
    assert row.difference == 0.5
    assert row.interval is not None
    # Half of 40 are 0, half are 1: the mean's standard error is 0.5 / sqrt(40) = 0.079.
    assert row.interval.low == pytest.approx(0.5 - 1.96 * 0.079, abs=0.03)
    assert row.interval.high == pytest.approx(0.5 + 1.96 * 0.079, abs=0.03)


def test_what_is_the_same_everywhere_has_no_interval() -> None:
    samples = {f"s{n}": [float(n % 7), float(n % 7)] for n in range(40)}
    milder = {sample: [score[0] + 1] for sample, score in samples.items()}
    bias = bias_rows([rater("Ann", samples), rater("Bob", milder)], [])[-1]
    assert (bias.difference, bias.interval) == (1.0, None)
    (row, *_) = (r for r in agreement_rows([rater("Ann", samples)], []) if r.kind == "self")
    assert (row.alpha, row.interval) == (1.0, None)
