"""The statistics held against scipy, which only the tests import."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from milepost.core.spikes import robust_z
from milepost.trajectory.statistics import bootstrap
from milepost.trajectory.statistics.correlation import Coefficient, correlate
from milepost.trajectory.statistics.paired import mcnemar
from milepost.trajectory.statistics.power_law import PowerLaw, fit_power_law

RTOL = 1e-9
"""Both work in float64; sums in another order move the last three or four digits at most."""


def series(num: int, *, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num)
    steps = np.sort(rng.choice(np.arange(1, 50 * num), num, replace=False)).astype(float)
    x, y = -np.log(steps) + rng.normal(0, 0.5, num), np.log(steps) + rng.normal(0, 0.5, num)
    if kind == "ties":
        x, y = np.round(2 * x) / 2, np.round(2 * y) / 2
    elif kind == "unrelated":
        x, y = rng.normal(size=num), rng.standard_cauchy(num)
    return x, y, steps


def known(one: Coefficient | None) -> Coefficient:
    assert one is not None
    return one


@pytest.mark.parametrize("kind", ["trend", "ties", "unrelated"])
@pytest.mark.parametrize("num", [4, 5, 10, 57, 450])
def test_coefficients_are_scipys(num: int, kind: str) -> None:
    x, y, steps = series(num, kind=kind)
    found, logs = correlate(x, y, steps=steps), np.log(steps)
    for one, wanted in (
        (found.pearson, stats.pearsonr(x, y)),
        (found.trend, stats.pearsonr(logs, y)),
        (found.differences, stats.pearsonr(np.diff(x), np.diff(y))),
    ):
        assert known(one).value == pytest.approx(wanted.statistic, rel=RTOL)
        interval = wanted.confidence_interval(0.95)
        if num - (one is found.differences) > 3:
            fisher = known(one).fisher
            assert fisher is not None
            assert (fisher.low, fisher.high) == pytest.approx(tuple(interval), rel=1e-7)
    assert known(found.spearman).value == pytest.approx(stats.spearmanr(x, y).statistic, rel=RTOL)
    left = [v - np.polyval(np.polyfit(logs, v, 1), logs) for v in (x, y)]
    assert known(found.partial).value == pytest.approx(stats.pearsonr(*left).statistic, rel=1e-7)


@pytest.mark.parametrize("kind", ["trend", "ties", "unrelated"])
def test_the_bca_interval_is_scipys_on_the_same_resamples(kind: str) -> None:
    num = 24
    x, y, steps = series(num, kind=kind)
    assert bootstrap.num_resamples(num) == bootstrap.NUM_RESAMPLES
    found = correlate(x, y, steps=steps)

    def pearson(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
        return np.sum(a * b, axis) / np.sqrt(np.sum(a * a, axis) * np.sum(b * b, axis))

    def spearman(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return pearson(stats.rankdata(a, axis=axis), stats.rankdata(b, axis=axis), axis)

    for one, statistic in ((found.pearson, pearson), (found.spearman, spearman)):
        wanted = stats.bootstrap(
            (x, y),
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=bootstrap.NUM_RESAMPLES,
            rng=np.random.default_rng(bootstrap.SEED),
        ).confidence_interval
        interval = known(one).bootstrap
        assert interval is not None
        # The draws are the same. An end may lie one draw further where a resampled value equals
        # the coefficient up to rounding and only one of the two programs sees that.
        assert (interval.low, interval.high) == pytest.approx(tuple(wanted), abs=2e-4)


def test_mcnemars_p_value_is_the_binomial_tests() -> None:
    for gained, lost in (
        (0, 1),
        (3, 3),
        (10, 3),
        (7, 40),
        (5000, 4700),
        (1, 900),
        (50_000, 49_000),
    ):
        wanted = stats.binomtest(gained, gained + lost).pvalue
        assert mcnemar(gained, lost) == pytest.approx(wanted, rel=1e-9)


def test_robust_z_is_a_median_over_the_median_absolute_deviation() -> None:
    values = np.random.default_rng(0).normal(3, 0.1, 101)
    spread = stats.median_abs_deviation(values, scale="normal")
    assert robust_z(3.7, values) == pytest.approx((3.7 - np.median(values)) / spread, rel=1e-4)


def test_the_power_law_is_the_least_squares_fit() -> None:
    rng = np.random.default_rng(1)
    tokens = np.linspace(1.4e9, 2.2e10, 40)
    losses = 1.8 + 300 * tokens**-0.28 + rng.normal(0, 0.01, 40)
    found = fit_power_law(tokens, losses)
    assert isinstance(found, PowerLaw)

    def curve(t: np.ndarray, floor: float, height: float, exponent: float) -> np.ndarray:
        return floor + height * (t / 5e9) ** -exponent

    wanted, _ = optimize.curve_fit(
        curve, tokens, losses, p0=(2.0, 0.5, 0.5), xtol=1e-12, ftol=1e-12
    )
    height = found.scale * 5e9**-found.exponent
    assert (found.floor, height, found.exponent) == pytest.approx(tuple(wanted), rel=1e-5)


def test_the_normal_deviate_of_a_sum_of_squares_is_near_chi_squares() -> None:
    # The approximation behind outliers.THRESHOLD: by chance 1 checkpoint in 300,000.
    for num in (1, 2, 3, 7, 9):
        variance = 2 / (9 * num)
        mean_square = (4.5 * math.sqrt(variance) + 1 - variance) ** 3
        chance = stats.chi2.sf(num * mean_square, num)
        assert chance < 1 / 200_000
