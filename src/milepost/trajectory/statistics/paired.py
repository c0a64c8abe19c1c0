"""Two scores on the same items, compared item by item.

What is hard is hard for both, so the items that changed sides tell two checkpoints apart far more
surely than their two standard errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from milepost.trajectory.fields import whole
from milepost.trajectory.statistics.correlation import Interval

CHOICES = {"acc": "chosen", "acc_norm": "chosen_norm"}
"""Metric to the field of an item that says which choice was taken (docs/contract.md)."""

_NORMAL_97_5 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class PairedTest:
    """The difference of two accuracies on the same items.

    Attributes:
        n: items.
        num_gained: wrong before and right after.
        num_lost: right before and wrong after.
        before: accuracy, a fraction, as the next two.
        after: likewise.
        difference: after less before.
        interval: of the difference, 95 %.
        p_value: of no difference, two-sided, exact.
    """

    n: int
    num_gained: int
    num_lost: int
    before: float
    after: float
    difference: float
    interval: Interval
    p_value: float


def paired_test(
    before: list[dict[str, Any]], after: list[dict[str, Any]], *, metric: str
) -> PairedTest | str:
    """The test, or why the two cannot be compared.

    Args:
        before: lines of an items file, in any order.
        after: lines of another.
        metric: "acc" or "acc_norm".
    """
    if metric not in CHOICES:
        return f"items do not say how {metric} came about"
    old, new = _answers(before, metric=metric), _answers(after, metric=metric)
    if isinstance(old, str) or isinstance(new, str):
        return old if isinstance(old, str) else str(new)
    if old.keys() != new.keys():
        num = len(old.keys() ^ new.keys())
        return f"the two were not scored on the same items ({num:,} are in one of them only)"
    if any(gold != new[item][0] for item, (gold, _) in old.items()):
        return "the two do not agree on which answers are right"
    if not old:
        return "there are no items"
    pairs = [(is_right, new[item][1]) for item, (_, is_right) in old.items()]
    return _test(
        n=len(pairs),
        num_right=sum(is_right for is_right, _ in pairs),
        num_gained=sum(is_now and not was for was, is_now in pairs),
        num_lost=sum(was and not is_now for was, is_now in pairs),
    )


def _answers(items: list[dict[str, Any]], *, metric: str) -> dict[str, tuple[int, bool]] | str:
    """Item to its right choice and whether that was taken."""
    found: dict[str, tuple[int, bool]] = {}
    for item in items:
        gold, chosen = whole(item.get("gold")), whole(item.get(CHOICES[metric]))
        if gold is None or chosen is None or not isinstance(item.get("id"), str | int):
            return f"an item does not say what {metric} was made of"
        found[str(item["id"])] = gold, gold == chosen
    if len(found) < len(items):
        return "two items have the same id"
    return found


def _test(*, n: int, num_right: int, num_gained: int, num_lost: int) -> PairedTest:
    after = num_right + num_gained - num_lost
    return PairedTest(
        n=n,
        num_gained=num_gained,
        num_lost=num_lost,
        before=num_right / n,
        after=after / n,
        difference=(num_gained - num_lost) / n,
        interval=_newcombe(n=n, num_right=num_right, num_gained=num_gained, num_lost=num_lost),
        p_value=mcnemar(num_gained, num_lost),
    )


def score_interval(num: int, *, n: int) -> Interval:
    """The 95 % score interval of a proportion (Wilson 1927): of `num` in `n`, which is above 0."""
    z = _NORMAL_97_5
    middle = num + z * z / 2
    half = z * math.sqrt(num * (n - num) / n + z * z / 4)
    return Interval((middle - half) / (n + z * z), (middle + half) / (n + z * z))


def mcnemar(num_gained: int, num_lost: int) -> float:
    """The exact two-sided p-value of as many gains as losses: a binomial test at one half.

    McNemar 1947, Psychometrika 12, 153-157; exact as in Liddell 1983, J. Epidemiol. Community
    Health 37, 82-84.
    """
    total, fewer = num_gained + num_lost, min(num_gained, num_lost)
    if 2 * fewer >= total:
        return 1.0
    # Terms fall from the largest on, each a ratio of the one before: no factorial overflows.
    term = whole_sum = 1.0
    for k in range(fewer, 0, -1):
        term *= k / (total - k + 1)
        whole_sum += term
        if term < 1e-17 * whole_sum:
            break
    largest = math.lgamma(total + 1) - math.lgamma(fewer + 1) - math.lgamma(total - fewer + 1)
    log_tail = largest + math.log(whole_sum) - total * math.log(2)
    return min(1.0, 2 * math.exp(log_tail))


def _newcombe(*, n: int, num_right: int, num_gained: int, num_lost: int) -> Interval:
    """Newcombe 1998, Statist. Med. 17, 2635-2650, method 10: of paired proportions.

    It joins the two proportions' own score intervals by the correlation of the pairs, and holds
    for few items and at 0 and 1, where the usual one has width 0.
    """
    num_after = num_right + num_gained - num_lost
    before, after = num_right / n, num_after / n
    of_before, of_after = score_interval(num_right, n=n), score_interval(num_after, n=n)
    low_before, high_before = of_before.low, of_before.high
    low_after, high_after = of_after.low, of_after.high
    phi = _phi(n=n, num_right=num_right, num_gained=num_gained, num_lost=num_lost)
    below, above = after - low_after, high_before - before
    beyond, beneath = high_after - after, before - low_before
    down = math.sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))
    up = math.sqrt(max(0.0, beyond**2 - 2 * phi * beyond * beneath + beneath**2))
    difference = (num_gained - num_lost) / n
    return Interval(max(-1.0, difference - down), min(1.0, difference + up))


def _phi(*, n: int, num_right: int, num_gained: int, num_lost: int) -> float:
    """Correlation of before and after; one above 0 has Newcombe's continuity correction."""
    both, neither = num_right - num_lost, n - num_right - num_gained
    num_after = num_right + num_gained - num_lost
    margins = num_right * (n - num_right) * num_after * (n - num_after)
    if margins == 0:
        return 0.0
    shared = both * neither - num_gained * num_lost
    if shared > 0:
        return max(shared - n / 2, 0.0) / math.sqrt(margins)
    return shared / math.sqrt(margins)
