"""Correlations of two metrics: values, intervals, absences and what is said of them."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.trajectory.statistics import bootstrap
from milepost.trajectory.statistics.correlation import (
    Coefficient,
    Correlation,
    Interval,
    conclusion,
    correlate,
)

# Tables II and IV of arXiv 2412.13335.
STEPS = np.array([2700, 3300, 5100, 7500, 15700, 20000, 23900, 35000, 40500, 43250], float)
RUBRIC = np.array([3.5, 4.5, 4.5, 5.0, 5.5, 5.5, 6.0, 6.17, 6.33, 6.83])
LOSS = np.array([3.00, 2.93, 2.79, 2.71, 2.65, 2.55, 2.50, 2.48, 2.46, 2.47])
HELLASWAG = np.array([31.9, 32.9, 37.7, 40.5, 46.9, 49.6, 50.2, 52.5, 53.2, 56.1])

NAMES = {"x": "validation loss", "y": "HellaSwag"}


def of(one: Coefficient | None) -> float:
    assert one is not None
    return one.value


def noise(num: int, *, seed: int = 0, size: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, num)


def test_the_hand_worked_example_comes_out() -> None:
    # With deviations (-1, -2, 1, 0, 2), (-2, 0, -1, 2, 1) and (-2, -1, 0, 1, 2), whose squares
    # add to 10 each, the products add to 3 (x, y), 8 (x, log) and 8 (y, log).
    x, y = np.array([2, 1, 4, 3, 5]), np.array([1, 3, 2, 5, 4])
    found = correlate(x, y, steps=np.exp(np.arange(1, 6)))
    assert found.n == 5 and found.absence is None and found.num_without_log == 0
    assert of(found.pearson) == pytest.approx(0.3, abs=1e-12)
    assert of(found.spearman) == pytest.approx(0.3, abs=1e-12)  # the values are their own ranks
    assert of(found.trend) == pytest.approx(0.8, abs=1e-12)
    assert of(found.partial) == pytest.approx((0.3 - 0.8 * 0.8) / 0.36, abs=1e-12)
    # Changes (-1, 3, -1, 2) and (2, -1, 3, -1): products of deviations -12.25, squares 12.75.
    assert of(found.differences) == pytest.approx(-12.25 / 12.75, abs=1e-12)
    # log(steps) changes by 1 each time: nothing of the changes can be its doing.
    assert found.differences_given == found.differences


def test_of_the_changes_too_log_steps_are_taken_out() -> None:
    x, y, logs = np.array([0, 2, 3, 7, 9]), np.array([0, 1, 4, 3, 5]), np.array([0, 1, 3, 4, 6])
    found = correlate(x, y, steps=np.exp(logs))
    # Changes (2, 1, 4, 2), (1, 3, -1, 2) and (1, 2, 1, 2). Deviations (-.25, -1.25, 1.75, -.25),
    # (-.25, 1.75, -2.25, .75) and (-.5, .5, -.5, .5): squares 4.75, 8.75 and 1; products -6.25
    # (x, y), -1.5 (x, log) and 2.5 (y, log).
    both, with_x, with_y = -6.25 / (4.75 * 8.75) ** 0.5, -1.5 / 4.75**0.5, 2.5 / 8.75**0.5
    given = (both - with_x * with_y) / ((1 - with_x**2) * (1 - with_y**2)) ** 0.5
    assert of(found.differences) == pytest.approx(both, abs=1e-12)
    assert of(found.differences_given) == pytest.approx(given, abs=1e-12)


def test_fishers_interval_is_the_one_worked_by_hand() -> None:
    found = correlate(np.arange(1, 6), np.array([2, 1, 4, 3, 5]), steps=np.array([1, 2, 4, 5, 9.0]))
    assert found.pearson is not None and found.pearson.fisher is not None
    assert found.spearman is not None and found.spearman.fisher is not None
    # r = 0.8, z = 1.09861, half = 1.95996 / sqrt(2) = 1.38590.
    assert found.pearson.fisher.low == pytest.approx(-0.27964, abs=1e-5)
    assert found.pearson.fisher.high == pytest.approx(0.98620, abs=1e-5)
    # Of ranks half is 1.38590 * sqrt(1.06) = 1.42687: tanh(-0.32826) and tanh(2.52548).
    assert found.spearman.fisher.low == pytest.approx(-0.31695, abs=1e-5)
    assert found.spearman.fisher.high == pytest.approx(0.98728, abs=1e-5)


def test_ties_have_their_average_rank() -> None:
    # Ranks 1.5, 1.5, 3, 4 and 1, 2.5, 2.5, 4: products of deviations 3.75, squares 4.5.
    found = correlate(np.array([7, 7, 8, 9]), np.array([1, 2, 2, 3]), steps=np.arange(1, 5))
    assert of(found.spearman) == pytest.approx(3.75 / 4.5, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "r", "spearman"),
    [(STEPS, 0.930, 0.994), (LOSS, -0.956, -0.982), (HELLASWAG, 0.966, 0.994)],
)
def test_the_papers_tables_give_their_own_coefficients(
    x: np.ndarray, r: float, spearman: float
) -> None:
    found = correlate(x, RUBRIC, steps=STEPS)
    assert round(of(found.pearson), 3) == r
    assert round(of(found.spearman), 3) == spearman
    assert round(of(found.trend), 3) == 0.969


def test_the_papers_correlations_are_called_a_trend_alone() -> None:
    told = conclusion(correlate(LOSS, RUBRIC, steps=STEPS), x="validation loss", y="the rubric")
    assert told.startswith("Validation loss and the rubric go opposite ways: r = −0.956")
    assert "This is a trend alone" in told
    assert "log(steps) alone goes with the rubric at r = 0.969" in told
    assert "10 points of one run" in told and "intervals are too narrow" in told
    assert "cause" not in told
    told = conclusion(correlate(HELLASWAG, RUBRIC, steps=STEPS), x="HellaSwag", y="the rubric")
    assert told.startswith("HellaSwag and the rubric go together: r = 0.966")
    assert "This is a trend alone" in told


def test_against_the_steps_themselves_only_the_trend_is_told() -> None:
    found = correlate(STEPS, RUBRIC, steps=STEPS)
    assert found.is_with_time and found.partial is None and found.differences is None
    told = conclusion(found, x="steps", y="the rubric")
    assert told.startswith("The rubric rises with the steps: r = 0.930 (95 % interval 0.724 to")
    assert "with log(steps), r = 0.969" in told


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [
        ([], [], "there is no common step"),
        ([1], [1], "there is one point only"),
        ([1, 2], [1, 2], "any two points lie on a line"),
        ([1, 1, 1], [1, 2, 3], "one of the two is constant"),
        ([1, 2, 3], [0, 0, 0], "one of the two is constant"),
        ([5, 5, 5], [0, 0, 0], "both are constant"),
        ([1, 2, math.nan], [1, 2, 3], "a value is not finite"),
        ([1, 2, 3], [1, math.inf, 3], "a value is not finite"),
        ([0.1 + 0.2, 0.3, 0.3], [1, 2, 3], "one of the two is constant"),  # up to rounding
    ],
)
def test_where_there_is_no_coefficient_it_says_why(
    x: list[float], y: list[float], why: str
) -> None:
    found = correlate(np.array(x), np.array(y), steps=np.arange(len(x)))
    assert found == Correlation(len(x), None, None, None, None, None, why)
    told = conclusion(found, **NAMES)
    assert told == f"No correlation of validation loss and HellaSwag can be given: {why}."


def test_three_points_have_a_coefficient_and_nothing_follows() -> None:
    found = correlate(np.array([1, 2, 4]), np.array([1, 3, 2]), steps=np.array([1, 2, 3]))
    assert found.pearson == Coefficient(of(found.pearson), None, None)
    assert found.partial is None and found.differences is None  # two changes, one degree too few
    assert "too few for an interval, so nothing follows" in conclusion(found, **NAMES)


def test_identical_series_lie_on_a_line_without_an_interval() -> None:
    x = noise(20)
    found = correlate(x, x, steps=np.arange(1, 21))
    assert found.pearson == Coefficient(1.0, None, None, is_exact=True)
    assert found.spearman == Coefficient(1.0, None, None, is_exact=True)
    assert "lie on one straight line at all 20 points (r = 1)" in conclusion(found, **NAMES)


def test_a_step_without_a_logarithm_is_left_out_of_what_needs_one_and_counted() -> None:
    steps = np.array([0, 1, 2, 3, 4, 5, math.nan])
    x, y = noise(7, seed=1), noise(7, seed=2)
    found, rest = correlate(x, y, steps=steps), correlate(x[1:6], y[1:6], steps=steps[1:6])
    assert found.num_without_log == 2
    assert (found.partial, found.trend) == (rest.partial, rest.trend)
    assert found.n == 7 and found.pearson != rest.pearson


def test_a_straight_line_of_log_steps_leaves_nothing_to_correlate() -> None:
    steps = np.arange(1, 30)
    found = correlate(3 - np.log(steps), noise(29), steps=steps)
    assert found.partial is None and found.pearson is not None


def test_more_than_a_trend_is_said_with_its_limits() -> None:
    steps, shared = np.arange(1, 61) * 100.0, noise(60, seed=3, size=0.3)
    x = shared - np.log(steps) + noise(60, seed=4, size=0.1)
    told = conclusion(correlate(x, np.log(steps) - shared, steps=steps), **NAMES)
    assert "Something is left beyond a trend in log(steps)" in told
    assert "This is a trend alone" not in told
    assert "does not show that one causes the other" in told


def test_two_curves_that_level_off_are_a_trend_alone_though_their_changes_go_together() -> None:
    steps = np.arange(1, 61) * 100.0
    loss, score = (
        7 - np.log(steps) + noise(60, size=0.01),
        np.log(steps) + noise(60, seed=1, size=0.01),
    )
    found = correlate(loss, score, steps=steps)
    assert found.differences is not None and found.differences.is_told_from_zero
    told = conclusion(found, **NAMES)
    assert (
        "This is a trend alone" in told and "as those of any two curves have that level off" in told
    )


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_nothing_beyond_the_trend_is_claimed_of_curves_that_share_nothing_else(kept: float) -> None:
    steps, rng, num_claims = np.arange(1, 61) * 100.0, np.random.default_rng(0), 0
    for _ in range(30):
        swings = rng.normal(size=(2, 60))
        for place in range(1, 60):  # slow ones, of which each keeps a share of the one before
            swings[:, place] += kept * swings[:, place - 1]
        loss, score = 0.1 * swings + np.stack([-np.log(steps), np.log(steps)])
        told = conclusion(correlate(loss, score, steps=steps), **NAMES)
        num_claims += "Something is left beyond a trend" in told
    assert num_claims <= 3  # of 200 there were 6, 3 and 1


def test_what_is_left_the_other_way_round_is_said() -> None:
    steps, shared = np.arange(1, 61) * 100.0, noise(60, seed=3, size=0.3)
    told = conclusion(
        correlate(np.log(steps) + shared, np.log(steps) - shared, steps=steps), **NAMES
    )
    assert "go together" in told and "the other way round" in told


def test_no_relation_told_is_not_taken_for_none() -> None:
    told = conclusion(correlate(noise(60), noise(60, seed=1), steps=np.arange(1, 61)), **NAMES)
    assert told.startswith("These 60 points do not tell whether validation loss and HellaSwag")
    assert "That does not show that there is no relation." in told


def test_one_far_point_makes_no_relation() -> None:
    x, y = noise(40, size=0.1), noise(40, seed=1, size=0.1)
    x[20] = y[20] = 9.0
    found = correlate(x, y, steps=np.arange(1, 41))
    assert of(found.pearson) > 0.99
    assert "do not tell whether" in conclusion(found, **NAMES)


def test_where_ranks_tell_another_story_it_is_said() -> None:
    steps = np.arange(1, 41)
    bent = np.exp(steps / 2.0) * (1 + noise(40, size=0.01))
    bent[-1] = -bent[-2]  # one point turns the line about, and hardly the ranks
    found = correlate(steps + noise(40, size=0.1), bent, steps=steps)
    assert "Their ranks go together (r = 0." in conclusion(found, **NAMES)
    x, y = noise(40, size=0.1), noise(40, seed=1, size=0.1)
    x[:4] = y[:4] = [5.0, 6.0, 7.0, 8.0]
    told = conclusion(correlate(x, y, steps=steps), **NAMES)
    assert "a few points carry it" in told


def test_without_a_trend_nothing_is_called_one() -> None:
    def one(value: float, low: float, high: float) -> Coefficient:
        return Coefficient(value, Interval(low, high), None)

    left, trend = one(0.3, -0.02, 0.57), one(0.2, -0.12, 0.48)
    r = one(0.4, 0.1, 0.63)
    found = Correlation(40, r, r, left, left, trend, None, differences_given=left)
    told = conclusion(found, **NAMES)
    assert "these points do not tell a relation from a trend" in told
    assert "trend alone" not in told


def test_the_same_input_gives_the_same_bits() -> None:
    assert correlate(LOSS, RUBRIC, steps=STEPS) == correlate(LOSS, RUBRIC, steps=STEPS)


def test_resamples_without_a_coefficient_are_counted() -> None:
    x = np.array([0, 0, 0, 0, 0, 0, 0, 1.0])
    found = correlate(x, noise(8), steps=np.arange(1, 9))
    assert found.pearson is not None
    # A resample misses the only other value with a chance of (7 / 8)**8 = 0.344.
    assert found.pearson.num_left_out == pytest.approx(0.344 * bootstrap.NUM_RESAMPLES, rel=0.05)


@pytest.mark.parametrize("num", [bootstrap.MIN_POINTS - 1, bootstrap.MAX_POINTS + 1])
def test_too_few_and_too_many_points_have_no_bootstrap(num: int) -> None:
    found = correlate(noise(num), noise(num, seed=1), steps=np.arange(1, num + 1))
    assert found.pearson is not None and found.pearson.bootstrap is None
    assert found.pearson.interval == found.pearson.fisher is not None


@pytest.mark.long
def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered, num = np.random.default_rng(5), 0, 400
    for _ in range(num):
        x = rng.normal(size=25)
        y = 0.6 * x + 0.8 * rng.normal(size=25)
        found = correlate(x, y, steps=np.arange(1, 26))
        assert found.pearson is not None and found.pearson.bootstrap is not None
        covered += found.pearson.bootstrap.holds(0.6)
    # BCa is a little narrow at 25 points: about 0.93. Of 400, 4 standard errors are 0.05.
    assert 0.88 <= covered / num <= 0.99


values = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: round(v, 3)), min_size=6, max_size=12
)


@settings(max_examples=25, deadline=None)
@given(values, st.integers(0, 99), st.sampled_from([0.5, -3.0, 1e6]), st.floats(-1e3, 1e3))
def test_coefficients_keep_their_bounds_and_their_size_under_other_units(
    x: list[float], seed: int, scale: float, shift: float
) -> None:
    steps = np.arange(1, len(x) + 1)
    one, other = np.array(x), noise(len(x), seed=seed)
    found = correlate(one, other, steps=steps)
    moved = correlate(one, scale * other + shift, steps=steps)
    assert found.absence == moved.absence
    for name in ("pearson", "spearman", "partial", "differences"):
        before, after = getattr(found, name), getattr(moved, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert -1 <= before.value <= 1
            assert after.value == pytest.approx(math.copysign(1, scale) * before.value, abs=1e-6)


@pytest.mark.parametrize("size", [1e-300, 1e-9, 1e9, 1e300, 1.7e308])
def test_huge_and_tiny_values_do_not_overflow(size: float) -> None:
    x, y = noise(10), noise(10, seed=1)
    x /= np.max(np.abs(x))
    with np.errstate(all="raise", under="ignore"):
        found = correlate(size * x, y, steps=np.arange(1, 11))
    assert of(found.pearson) == pytest.approx(of(correlate(x, y, steps=np.arange(1, 11)).pearson))


def test_integers_are_numbers_too() -> None:
    x = np.array([2**53, 0, 3, 2**52, 17, 4])
    found = correlate(x, np.array([3, 1, 1, 2, 1, 1]), steps=np.array([1, 2, 3, 4, 5, 6]))
    assert of(found.pearson) > 0.9


def test_the_developers_copy_of_the_papers_tables_is_the_one_above(shared_data: Path) -> None:
    path = shared_data.parent / "paper" / "tables.toml"
    if not path.is_file():
        pytest.skip("the paper's tables are not beside this checkout")
    tables = tomllib.loads(path.read_text())
    assert [row[0] for row in tables["table_2"]["rows"]] == STEPS.tolist()
    assert [row[-1] for row in tables["table_2"]["rows"]] == RUBRIC.tolist()
    assert [row[1:] for row in tables["table_4"]["rows"]] == np.stack([LOSS, HELLASWAG], 1).tolist()
