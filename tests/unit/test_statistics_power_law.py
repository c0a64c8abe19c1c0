"""Loss against tokens: the fit, its intervals, what it predicts and when it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from milepost.trajectory.statistics.power_law import (
    MAX_POINTS,
    MIN_POINTS,
    MIN_POINTS_FOR_INTERVALS,
    PowerLaw,
    fit_power_law,
)

FLOOR, SCALE, EXPONENT = 1.8, 300.0, 0.28


def law(tokens: np.ndarray) -> np.ndarray:
    return FLOOR + SCALE * tokens**-EXPONENT


def tokens_of(num: int, *, last: float = 2.2e10, span: float = 16.0) -> np.ndarray:
    return np.linspace(last / span, last, num)


def waves(num: int, *, seed: int = 0, kept: float = 0.0) -> np.ndarray:
    """Normal noise of deviation 1, of which each keeps a share of the one before."""
    drawn = np.random.default_rng(seed).normal(size=num)
    for place in range(1, num):
        drawn[place] = kept * drawn[place - 1] + math.sqrt(1 - kept**2) * drawn[place]
    return drawn


def fit(tokens: np.ndarray, losses: np.ndarray) -> PowerLaw:
    found = fit_power_law(tokens, losses)
    assert isinstance(found, PowerLaw), found
    return found


@pytest.mark.parametrize("exponent", [0.05, 0.28, 1.0, 2.0])
def test_an_exact_law_is_found_again(exponent: float) -> None:
    tokens = np.geomspace(1e9, 2.2e10, 12)
    losses = 1.8 + 1.5 * (tokens / 1e9) ** -exponent
    found = fit(tokens, losses)
    assert found.exponent == pytest.approx(exponent, rel=1e-6)
    assert found.floor == pytest.approx(1.8, rel=1e-5)
    assert found.scale == pytest.approx(1.5 * 1e9**exponent, rel=1e-4)
    assert (found.n, found.num_left_out, found.first_tokens) == (12, 0, 1e9)
    assert found.predict(4.4e10)[0] == pytest.approx(1.8 + 1.5 * 44**-exponent, rel=1e-6)


def test_the_intervals_hold_the_truth_of_a_noisy_law() -> None:
    tokens = tokens_of(60)
    found = fit(tokens, law(tokens) + 0.01 * waves(60))
    assert found.floor_interval is not None and found.floor_interval.holds(FLOOR)
    assert found.exponent_interval is not None and found.exponent_interval.holds(EXPONENT)
    loss, interval = found.predict(2 * tokens[-1])
    assert interval is not None and interval.holds(loss)
    assert interval.holds(float(law(2 * tokens[-1])))
    assert found.rmse == pytest.approx(0.01, rel=0.3)


def test_slow_waves_make_the_intervals_wider() -> None:
    tokens = tokens_of(100)
    calm, wavy = (fit(tokens, law(tokens) + 0.01 * waves(100, kept=k)) for k in (0.0, 0.9))
    assert calm.floor_interval is not None and wavy.floor_interval is not None
    one, other = (i.high - i.low for i in (calm.floor_interval, wavy.floor_interval))
    assert other > 1.3 * one


def test_the_same_input_gives_the_same_bits() -> None:
    tokens = tokens_of(30)
    losses = law(tokens) + 0.02 * waves(30)
    one, other = fit(tokens, losses), fit(tokens, losses)
    assert one == other and one.predict(5e10) == other.predict(5e10)


def test_the_order_of_the_points_does_not_matter() -> None:
    tokens = np.linspace(0, 2.2e10, 600)
    losses = 3 - 1e-11 * tokens + 0.01 * waves(600)
    mixed = np.random.default_rng(0).permutation(600)
    assert fit(tokens[mixed], losses[mixed]) == fit(tokens, losses)


def test_a_floor_is_never_below_zero() -> None:
    tokens = tokens_of(30)
    found = fit(tokens, 40 * tokens**-0.12 - 0.3)
    assert found.floor == 0.0
    assert found.floor_interval is None and found.predict(5e10)[1] is None


def test_the_beginning_is_left_out_and_counted() -> None:
    tokens = np.linspace(0, 2.2e10, 451)
    losses = law(np.maximum(tokens, 1e8))
    losses[:5] = 10.9
    found = fit(tokens, losses)
    assert found.exponent == pytest.approx(EXPONENT, rel=1e-6)
    assert found.first_tokens >= 2.2e10 / 50
    assert found.n + found.num_left_out == 451


def test_a_long_series_is_thinned_out_evenly_in_log_tokens() -> None:
    tokens = np.arange(1, 45_001) * 524288.0
    found = fit(tokens, law(tokens))
    assert MAX_POINTS / 2 < found.n <= MAX_POINTS
    assert found.exponent == pytest.approx(EXPONENT, rel=1e-6)


def test_few_points_have_a_fit_and_no_intervals() -> None:
    for num, has_intervals in (
        (MIN_POINTS_FOR_INTERVALS - 1, False),
        (MIN_POINTS_FOR_INTERVALS, True),
    ):
        tokens = tokens_of(num)
        found = fit(tokens, law(tokens) + 0.001 * waves(num))
        assert (found.floor_interval is not None) is has_intervals
        assert (found.predict(5e10)[1] is not None) is has_intervals


TOKENS = tokens_of(20)


@pytest.mark.parametrize(
    ("tokens", "losses", "why"),
    [
        (TOKENS[:0], TOKENS[:0], "there are 0 points to fit, and 5 are needed"),
        (TOKENS[:1], law(TOKENS[:1]), "there is 1 point to fit"),
        (TOKENS[: MIN_POINTS - 1], law(TOKENS[: MIN_POINTS - 1]), "there are 4 points to fit"),
        (np.r_[0.0, TOKENS[:4]], np.ones(5), "there are 4 points to fit"),
        (tokens_of(20, span=3.9), law(tokens_of(20)), "grow by a factor of 3.9 only"),
        (TOKENS, np.full(20, 2.0), "the loss does not fall"),
        (TOKENS, 2 + TOKENS / 1e10, "the loss does not fall"),
        (TOKENS, 3 - 0.01 * np.log(TOKENS), "so slowly, along log(tokens), that no exponent"),
        (TOKENS, np.r_[9.0, np.full(19, 2.0)], "the loss falls at the beginning only"),
        (TOKENS, np.r_[math.nan, law(TOKENS[1:])], "a value is not finite"),
    ],
)
def test_it_refuses_in_words(tokens: np.ndarray, losses: np.ndarray, why: str) -> None:
    found = fit_power_law(tokens, losses)
    assert isinstance(found, str) and why in found


def test_the_papers_table_gives_a_law() -> None:
    # Table IV of arXiv 2412.13335, with its 524,288 tokens a step.
    steps = np.array([2700, 3300, 5100, 7500, 15700, 20000, 23900, 35000, 40500, 43250])
    losses = np.array([3.00, 2.93, 2.79, 2.71, 2.65, 2.55, 2.50, 2.48, 2.46, 2.47])
    found = fit(steps * 524288.0, losses)
    assert found.n == 10 and found.rmse < 0.03
    loss, interval = found.predict(2 * 43250 * 524288.0)
    assert interval is not None and interval.low < loss < 2.46


@pytest.mark.long
@pytest.mark.parametrize(
    ("num", "kept", "least"), [(10, 0.0, 0.87), (40, 0.0, 0.89), (40, 0.8, 0.85), (300, 0.9, 0.75)]
)
def test_the_intervals_cover_the_truth_about_as_often_as_they_say(
    num: int, kept: float, least: float
) -> None:
    tokens, covered, num_runs = tokens_of(num), np.zeros(2), 100
    for seed in range(num_runs):
        found = fit(tokens, law(tokens) + 0.01 * waves(num, seed=seed, kept=kept))
        if found.floor_interval is None or found.exponent_interval is None:
            covered += 1  # it claims nothing
        else:
            covered += (found.floor_interval.holds(FLOOR), found.exponent_interval.holds(EXPONENT))
    assert (covered / num_runs >= least).all(), covered
