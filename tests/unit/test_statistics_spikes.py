"""Jumps in a series: found, sized, timed, joined; and series that have none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.core.spikes import MIN_HISTORY, RELATIVE_FLOOR, Spike, find_spikes, robust_z


def noise(num: int, *, seed: int = 0, size: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, num)


def falling(num: int = 600) -> np.ndarray:
    return 2 + 5 * np.exp(-np.arange(num) / 100) + noise(num, size=0.05)


def spikes_of(values: np.ndarray | list[float]) -> list[Spike]:
    return find_spikes(values, window=50, threshold=7.0)


def test_robust_z_is_the_one_worked_by_hand() -> None:
    # Median 3, deviations 2 1 0 1 97: their median is 1.
    assert robust_z(9, [1, 2, 3, 4, 100]) == pytest.approx(6 / 1.4826)
    assert robust_z(3, [1, 2, 3, 4, 100]) == 0
    assert robust_z(-3, [1, 2, 3, 4, 100]) == pytest.approx(-6 / 1.4826)


def test_the_spread_has_a_floor_so_that_a_flat_series_has_no_jumps() -> None:
    assert robust_z(2.002, [2.0] * 30) == pytest.approx(1.0)
    assert robust_z(5.0, [0.0] * 30) == 0.0  # no level, no spread: nothing to measure with
    assert spikes_of([2.0] * 200) == []
    assert spikes_of([0.0] * 100 + [1.0] + [0.0] * 100) == []
    almost_flat = 2.0 + noise(2000, size=2.0 * RELATIVE_FLOOR / 2)
    assert spikes_of(almost_flat) == []


def test_a_jump_is_found_sized_and_timed() -> None:
    values = falling()
    clean = values.copy()
    values[400:420] += np.linspace(1.5, 0.5, 20)
    (spike,) = spikes_of(values)
    assert (spike.first, spike.recovered) == (400, 420)
    assert 400 <= spike.peak < 410
    assert spike.level == pytest.approx(np.median(clean[350:400]))
    assert spike.height == pytest.approx(values[spike.peak] - spike.level)
    spread = 1.4826 * np.median(np.abs(values[350:400] - spike.level))
    assert spike.z == pytest.approx(spike.height / spread)


def test_a_value_back_for_a_moment_is_not_a_recovery() -> None:
    values = np.r_[noise(200, size=0.05) + 2, [4, 2, 4, 2, 2, 2, 4], [2.0] * 50]
    (spike,) = spikes_of(values)
    assert (spike.first, spike.recovered) == (200, 207)


def test_a_shift_that_stays_has_no_recovery() -> None:
    values = noise(400, size=0.05) + 2
    values[200:] += 1
    (spike,) = spikes_of(values)
    assert spike.first == 200 and spike.recovered is None


def test_a_jump_at_the_very_end_is_not_called_over() -> None:
    values = np.r_[noise(200, size=0.05) + 2, [4.0], [2.0] * 5]
    assert spikes_of(values)[0].recovered is None
    assert spikes_of(np.r_[values, 2.0])[0].recovered == 201


def test_two_jumps_with_a_recovery_between_are_two() -> None:
    values = noise(400, size=0.05) + 2
    values[200:203] += 1
    values[215] += 2
    one, other = spikes_of(values)
    assert (one.first, other.first) == (200, 215)
    assert one.height < other.height


def test_a_falling_series_and_a_rising_one_have_none() -> None:
    assert spikes_of(falling(3000)) == []
    assert spikes_of(np.linspace(0, 5, 3000) + noise(3000, size=0.05)) == []
    assert spikes_of(-falling(3000)) == []


@pytest.mark.parametrize("num", [0, 1, MIN_HISTORY - 1, MIN_HISTORY])
def test_too_short_a_series_has_none(num: int) -> None:
    assert spikes_of([2.0] * num) == []


def test_the_first_values_that_can_be_judged_are() -> None:
    values = np.r_[noise(MIN_HISTORY, size=0.05) + 2, 9.0]
    assert [spike.first for spike in spikes_of(values)] == [MIN_HISTORY]
    assert spikes_of(values[1:]) == []


def test_values_that_are_not_finite_are_passed_over() -> None:
    values = falling()
    values[400] += 2
    holes = np.insert(values, [10, 399, 401], [math.nan, math.inf, math.nan])
    (spike,), (other,) = spikes_of(values), spikes_of(holes)
    assert (other.level, other.height, other.z) == (spike.level, spike.height, spike.z)
    assert spike.first == 400 and other.first == other.peak == 402
    assert spike.recovered == 401 and other.recovered == 404


def test_integers_are_values_too() -> None:
    values = [10, 11, 12] * 40 + [40] + [10, 11, 12] * 20
    assert [spike.height for spike in spikes_of(values)] == [29.0]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-5, 40), min_size=60, max_size=120),
    st.sampled_from([20, 21, 50]),
    st.sampled_from([3.5, 6.0]),
)
def test_the_quick_look_finds_what_the_definition_finds(
    values: list[int], window: int, threshold: float
) -> None:
    outstanding = [
        place
        for place in range(MIN_HISTORY, len(values))
        if robust_z(values[place], values[max(0, place - window) : place]) > threshold
    ]
    spikes = find_spikes(values, window=window, threshold=threshold)
    assert [spike.first for spike in spikes] == [
        place for place in outstanding if place in {spike.first for spike in spikes}
    ]
    assert bool(spikes) == bool(outstanding)
    for place in outstanding:  # each belongs to the jump that began last before it
        begun = [spike for spike in spikes if spike.first <= place][-1]
        assert values[begun.peak] >= values[begun.first]
        assert begun.recovered is None or place < begun.recovered or place == begun.first


def test_long_noise_has_no_jumps() -> None:
    assert find_spikes(noise(45_000) + 10, window=100, threshold=7.0) == []
