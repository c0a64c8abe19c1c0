"""Two scores on the same items: gains, losses, the exact test and the interval."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.trajectory.statistics.correlation import Interval
from milepost.trajectory.statistics.paired import PairedTest, mcnemar, paired_test


def items(answers: str, *, metric_field: str = "chosen") -> list[dict[str, Any]]:
    """An item a letter: '+' answered rightly, '-' wrongly."""
    other = {"chosen": "chosen_norm", "chosen_norm": "chosen"}[metric_field]
    return [
        {"id": f"item {n}", "gold": 1, metric_field: 1 if answer == "+" else 0, other: 3}
        for n, answer in enumerate(answers)
    ]


def test_of(both: int, gained: int, lost: int, neither: int) -> PairedTest:
    before = items("+" * both + "-" * gained + "+" * lost + "-" * neither)
    after = items("+" * both + "+" * gained + "-" * lost + "-" * neither)
    found = paired_test(before, after, metric="acc")
    assert isinstance(found, PairedTest)
    return found


test_of.__test__ = False  # type: ignore[attr-defined]


def test_the_hand_worked_example_comes_out() -> None:
    found = test_of(3, 6, 1, 2)
    assert (found.n, found.num_gained, found.num_lost) == (12, 6, 1)
    assert (found.before, found.after) == (4 / 12, 9 / 12)
    assert found.difference == 5 / 12
    # Of 7 that changed, 0 or 1 the one way or the other: 2 * (1 + 7) / 2**7.
    assert found.p_value == pytest.approx(0.125, rel=1e-12)


def test_items_are_matched_by_id_and_not_by_place() -> None:
    before, after = items("++--+-"), items("+-+-++")
    mixed = [after[n] for n in (3, 0, 5, 1, 4, 2)]
    assert paired_test(before, mixed, metric="acc") == paired_test(before, after, metric="acc")


def test_acc_norm_looks_at_its_own_choice() -> None:
    before, after = (items(a, metric_field="chosen_norm") for a in ("+--", "++-"))
    found, other = (paired_test(before, after, metric=name) for name in ("acc_norm", "acc"))
    assert isinstance(found, PairedTest) and (found.num_gained, found.num_lost) == (1, 0)
    assert isinstance(other, PairedTest) and (other.num_gained, other.before) == (0, 0.0)


def test_nothing_changed_is_no_difference_with_an_interval_about_it() -> None:
    found = test_of(5, 0, 0, 5)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.interval.low < 0 < found.interval.high


@pytest.mark.parametrize(
    ("cells", "interval"),
    [  # worked out by the formulas of Newcombe 1998, method 10, on a pocket calculator
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((53, 1, 0, 0), (-0.0496, 0.0977)),
        ((0, 30, 0, 0), (0.8395, 1.0000)),
        ((30, 0, 0, 0), (-0.1135, 0.1135)),
    ],
)
def test_the_interval_is_newcombes(
    cells: tuple[int, int, int, int], interval: tuple[float, float]
) -> None:
    found = test_of(*cells).interval
    assert (found.low, found.high) == pytest.approx(interval, abs=5e-5)


def test_one_item_is_enough_for_a_test_that_tells_nothing() -> None:
    found = test_of(0, 1, 0, 0)
    assert found.p_value == 1.0 and found.difference == 1.0
    assert found.interval.low < 0.5


@pytest.mark.parametrize(
    ("before", "after", "metric", "why"),
    [
        (items("++"), items("+++"), "acc", "(1 are in one of them only)"),
        (items("++"), items("++")[:0], "acc", "(2 are in one of them only)"),
        ([], [], "acc", "there are no items"),
        (items("+"), [items("+")[0] | {"gold": 0}], "acc", "do not agree on which answers"),
        (items("+"), [{"id": "item 0", "gold": 1}], "acc", "does not say what acc was made of"),
        (items("+"), [items("+")[0] | {"chosen": "1"}], "acc", "does not say what acc was made of"),
        (items("+"), [items("+")[0] | {"id": None}], "acc", "does not say what acc was made of"),
        (items("+") * 2, items("+") * 2, "acc", "two items have the same id"),
        (items("+"), items("+"), "perplexity", "do not say how perplexity came about"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(
    before: list[dict[str, Any]], after: list[dict[str, Any]], metric: str, why: str
) -> None:
    found = paired_test(before, after, metric=metric)
    assert isinstance(found, str) and why in found


@settings(max_examples=60, deadline=None)
@given(*[st.integers(0, 40)] * 4)
def test_turning_time_about_turns_the_sign(both: int, gained: int, lost: int, neither: int) -> None:
    if both + gained + lost + neither == 0:
        return
    one, other = test_of(both, gained, lost, neither), test_of(both, lost, gained, neither)
    assert one.difference == -other.difference and one.p_value == other.p_value
    assert 0 < one.p_value <= 1
    turned = Interval(-other.interval.high, -other.interval.low)
    assert (one.interval.low, one.interval.high) == pytest.approx((turned.low, turned.high))
    assert -1 <= one.interval.low <= one.difference <= one.interval.high <= 1


@pytest.mark.parametrize("num", [1, 2, 3, 10, 40])
def test_the_exact_p_value_is_the_sum_of_its_terms(num: int) -> None:
    for lost in range(num + 1):
        fewer = min(lost, num - lost)
        whole = sum(math.comb(num, k) for k in range(fewer + 1)) * 2 / 2**num
        assert mcnemar(num - lost, lost) == pytest.approx(min(1.0, whole), rel=1e-12)


def test_a_hundred_thousand_items_neither_overflow_nor_vanish() -> None:
    # So many follow the normal curve: 999 / sqrt(100,000) deviations, corrected for continuity.
    normal = 2 * NormalDist().cdf(-999 / 100_000**0.5)
    assert mcnemar(50_500, 49_500) == pytest.approx(normal, rel=1e-3)
    assert mcnemar(100_000, 0) == 0.0  # 2**-99999 is below any float


@pytest.mark.long
def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered, num = np.random.default_rng(7), 0, 1000
    for both, gained, lost, neither in rng.multinomial(80, [0.4, 0.15, 0.08, 0.37], num):
        interval = test_of(both, gained, lost, neither).interval
        covered += interval.low <= 0.07 <= interval.high
    # 95 % of 1,000 with 4 standard errors of 0.7 %.
    assert 0.922 <= covered / num <= 0.978
