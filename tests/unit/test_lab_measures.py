"""Spike, recovery, end and interval, on curves whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from milepost.experiments.lab.measures import (
    HELD_VALUES,
    Curve,
    Measure,
    difference,
    mean_of,
    noise_between,
    noise_of,
    smoothed,
)
from milepost.experiments.lab.measures import measure as measure_with


def measure(arm: Curve, parent: Curve, *, width: int) -> Measure | None:
    """Against a parent that sees the same batches."""
    noise = noise_between(parent, width=width, are_apart=False)
    return measure_with(arm, parent, width=width, noise=noise)


def curve(values: list[float] | np.ndarray, *, every: int = 1, first: int = 0) -> Curve:
    array = np.asarray(values, dtype=np.float64)
    return Curve(first + every * np.arange(len(array)), array)


def noisy(count: int, *, sigma: float, slope: float = 0.0, seed: int = 0) -> np.ndarray:
    steps = np.arange(count)
    return 4.0 + slope * steps + np.random.default_rng(seed).normal(0, sigma, count)


def test_the_noise_of_a_curve_is_that_about_its_course_whatever_its_slope() -> None:
    for slope in (0.0, -0.5):
        found = noise_of(noisy(2000, sigma=0.1, slope=slope))
        # The median deviation of 1,999 differences has a standard error of 2.6 % (Gaussian).
        assert found == pytest.approx(0.1, rel=0.1)


def test_a_few_jumps_do_not_move_the_noise() -> None:
    values = noisy(500, sigma=0.1)
    calm = noise_of(values)
    values[[100, 200, 300]] += 50
    assert noise_of(values) == pytest.approx(calm, rel=0.05)


def test_a_curve_of_one_value_has_no_noise() -> None:
    assert noise_of(np.array([3.0])) == 0.0


def test_the_same_curve_has_no_spike_is_recovered_at_once_and_is_equal() -> None:
    parent = curve(noisy(60, sigma=0.1))
    found = measure(parent, parent, width=5)
    assert found is not None
    assert (found.spike, found.recovered_after, found.end) == (0.0, 0, 0.0)
    assert found.is_equal


def test_a_spike_is_the_highest_difference_and_recovery_the_step_it_is_gone() -> None:
    values = noisy(100, sigma=0.01)
    arm = values.copy()
    arm[10:30] += 1.0
    arm[20] += 0.5
    arm[35] += 0.3  # back for five values only: not yet over before it
    arm[80] += 0.3  # long after it, one value that noise may give
    found = measure(curve(arm, every=5), curve(values, every=5), width=1)
    assert found is not None
    assert found.spike == pytest.approx(1.5)
    assert found.spike_step == 100
    assert found.recovered_after == 180
    assert found.spike_z == pytest.approx(1.5 / noise_of(values))
    assert not found.is_equal


@pytest.mark.parametrize(("height", "expected"), [(1.9, 0), (2.1, 11)])
def test_what_lies_in_two_deviations_is_noise(height: float, expected: int) -> None:
    values = noisy(100, sigma=0.1)
    arm = values.copy()
    arm[10] += height * noise_of(values)
    found = measure(curve(arm), curve(values), width=1)
    assert found is not None and found.recovered_after == expected


@pytest.mark.parametrize(("held", "expected"), [(HELD_VALUES - 1, 31), (HELD_VALUES, 20)])
def test_recovered_is_what_is_back_for_so_many_values(held: int, expected: int) -> None:
    values = noisy(100, sigma=0.01)
    arm = values.copy()
    arm[10:20] += 1.0
    arm[20 + held : 31] += 0.5
    found = measure(curve(arm), curve(values), width=1)
    assert found is not None and found.recovered_after == expected


def test_two_runs_on_other_batches_are_soon_back_in_the_noise_of_both() -> None:
    late = []
    for seed in range(20):
        parent = curve(noisy(300, sigma=0.1, seed=seed))
        arm = curve(noisy(300, sigma=0.1, seed=1000 + seed))
        noise = noise_between(parent, width=1, are_apart=True)
        # sigma * sqrt(2); the median deviation of 299 differences has a standard error of 7 %.
        assert noise == pytest.approx(0.1 * math.sqrt(2), rel=0.25)
        found = measure_with(arm, parent, width=1, noise=noise)
        assert found is not None
        if found.recovered_after is None:
            assert found.spike_step > 300 - HELD_VALUES, "too near the end to see"
        else:
            late.append(found.recovered_after - found.spike_step)
    # After the peak, which is anywhere, a run of ten comes after one value or a few.
    assert len(late) >= 17 and np.median(late) <= 2 and max(late) < 60


def test_a_curve_that_stays_above_never_recovers_and_one_below_needs_not_to() -> None:
    values = noisy(100, sigma=0.01)
    above, below = (measure(curve(values + shift), curve(values), width=1) for shift in (0.5, -0.5))
    assert above is not None and above.recovered_after is None
    assert above.end == pytest.approx(0.5)
    assert below is not None and below.recovered_after == 0
    assert (below.spike, below.end) == (pytest.approx(-0.5), pytest.approx(-0.5))


def test_the_end_is_the_mean_of_the_last_tenth() -> None:
    values = np.zeros(100)
    arm = np.zeros(100)
    arm[90:] = np.arange(10)
    found = measure(curve(arm), curve(values), width=1)
    assert found is not None and found.end == pytest.approx(4.5)
    assert found.spike_z is None, "a parent without noise is no measure"


def test_curves_are_compared_where_both_have_a_value() -> None:
    arm, parent = curve([1.0, 2.0, 3.0], every=10), curve([1.0, 1.0, 1.0], every=5, first=10)
    apart = difference(arm, parent)
    assert apart.steps.tolist() == [10, 20]
    assert apart.values.tolist() == [1.0, 2.0]
    assert measure(curve([1.0]), curve([1.0], first=7), width=1) is None


def test_smoothing_is_a_mean_of_the_last_values_of_what_there_is_at_first() -> None:
    assert smoothed(curve([1.0, 3.0, 5.0, 7.0]), width=3).values.tolist() == [1.0, 2.0, 3.0, 5.0]


def test_the_interval_is_students_and_wide_for_three_seeds() -> None:
    found = mean_of([1.0, 2.0, 3.0])
    assert found.interval is not None
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert found.value == 2.0
    assert found.interval.low == pytest.approx(2.0 - half, abs=1e-4)
    assert found.interval.high == pytest.approx(2.0 + half, abs=1e-4)


def test_one_seed_has_no_interval() -> None:
    assert mean_of([0.25]).interval is None


@pytest.mark.parametrize("count", range(2, 11))
def test_quantiles_are_those_of_scipy(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = list(range(count))
    found = mean_of([float(value) for value in values])
    assert found.interval is not None
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    # The table has four decimals.
    assert found.interval.high - found.value == pytest.approx(half, rel=2e-5)
