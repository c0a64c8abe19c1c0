"""How two metrics of one run move together, with intervals, and what follows from it.

docs/concepts/statistics.md says how each number is made and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from milepost.trajectory.statistics.bootstrap import Interval, Statistic, bootstrap
from milepost.trajectory.statistics.coefficients import (
    is_constant,
    of_ranks,
    product_moment,
    stacked,
    with_control,
)

MIN_POINTS = 3
FEW_POINTS = 30

_NORMAL_97_5 = NormalDist().inv_cdf(0.975)
_WHOLE = 1 - 1e-12  # a coefficient beyond this is 1 or -1, up to rounding


@dataclass(frozen=True)
class Coefficient:
    """A coefficient, -1 to 1, with 95 % intervals; one is None where it cannot be had.

    Attributes:
        fisher: from the coefficient and the number of points alone.
        bootstrap: BCa, from resampled points.
        num_left_out: resamples that have no such coefficient, because one side is constant.
        is_exact: 1 or -1 up to rounding, of more than three points: beyond intervals.
    """

    value: float
    fisher: Interval | None
    bootstrap: Interval | None
    num_left_out: int = 0
    is_exact: bool = False

    @property
    def interval(self) -> Interval | None:
        """What both intervals cover together: a claim has to hold by either."""
        known = [one for one in (self.fisher, self.bootstrap) if one is not None]
        if not known:
            return None
        return Interval(min(one.low for one in known), max(one.high for one in known))

    @property
    def is_told_from_zero(self) -> bool:
        """Whether no interval holds 0; False where there is none and the value is not exact."""
        return self.is_exact or (self.interval is not None and not self.interval.holds(0))


@dataclass(frozen=True)
class Correlation:
    """How two metrics move together; a coefficient is None where there is none.

    Attributes:
        n: points: common steps with both values.
        pearson: of the values.
        spearman: of their ranks.
        partial: Pearson given log(steps).
        differences: Pearson of the changes from one step to the next.
        trend: Pearson of y with log(steps).
        absence: why there is no coefficient, in words.
        differences_given: the same given the changes of log(steps). Two curves that level off
            have changes that go together whatever else they do; this is what is left of that.
        num_without_log: points that all with log(steps) leave out, because their step is 0 or
            unknown and so has no logarithm.
        is_with_time: x is the steps themselves; then there is `pearson`, `spearman`, `trend` only.
    """

    n: int
    pearson: Coefficient | None
    spearman: Coefficient | None
    partial: Coefficient | None
    differences: Coefficient | None
    trend: Coefficient | None
    absence: str | None
    differences_given: Coefficient | None = None
    num_without_log: int = 0
    is_with_time: bool = False

    @property
    def is_beyond_trend(self) -> bool:
        """Whether something is left given log(steps), of the values and of their changes.

        Both are asked for: slow swings of curves that share nothing leave much of the values, and
        any two curves that level off have changes that go together.
        """
        left = (self.partial, self.differences_given)
        return all(one is not None and one.is_told_from_zero for one in left)


def correlate(x: np.ndarray, y: np.ndarray, *, steps: np.ndarray) -> Correlation:
    """How x and y move together.

    Args:
        x: values at the common steps, [N].
        y: values at the same steps, [N].
        steps: ascending, [N]; NaN where a step is not known.

    Returns:
        The coefficients; those that these points do not have are None.
    """
    x, y, steps = (np.asarray(values, dtype=np.float64) for values in (x, y, steps))
    assert x.shape == y.shape == steps.shape and x.ndim == 1
    absence = _absence(x, y)
    if absence is not None:
        return Correlation(len(x), None, None, None, None, None, absence)
    is_with_time = bool(np.array_equal(x, steps))
    # In units of the largest, so that differences of huge values stay finite.
    x, y = x / np.max(np.abs(x)), y / np.max(np.abs(y))
    has_log = np.isfinite(steps) & (steps > 0)
    both = stacked(product_moment(x, y), of_ranks(x, y))
    pearson, spearman = _coefficients(both, len(x), kinds=(_PLAIN, _OF_RANKS))
    changes = product_moment(np.diff(x), np.diff(y))
    (differences,) = _coefficients(changes, len(x) - 1, kinds=(_PLAIN,))
    timed = (x[has_log], y[has_log], np.log(steps[has_log]))
    partial, trend = _coefficients(with_control(*timed), len(timed[0]), kinds=(_GIVEN_ONE, _PLAIN))
    left_of_changes = _left_of_changes(*(np.diff(values) for values in timed))
    return Correlation(
        n=len(x),
        pearson=pearson,
        spearman=spearman,
        partial=None if is_with_time else partial,
        differences=None if is_with_time else differences,
        trend=trend,
        absence=None,
        differences_given=None if is_with_time else left_of_changes,
        num_without_log=int(len(x) - has_log.sum()),
        is_with_time=is_with_time,
    )


def _left_of_changes(x: np.ndarray, y: np.ndarray, logs: np.ndarray) -> Coefficient | None:
    if is_constant(logs):  # steps as those of 1, 2, 4, 8: there is nothing to take out
        return _coefficients(product_moment(x, y), len(x), kinds=(_PLAIN,))[0]
    return _coefficients(with_control(x, y, logs), len(x), kinds=(_GIVEN_ONE, _PLAIN))[0]


def _absence(x: np.ndarray, y: np.ndarray) -> str | None:
    if len(x) < MIN_POINTS:
        few = ("there is no common step", "there is one point only", "any two points lie on a line")
        return few[len(x)]
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return "a value is not finite"
    num_constant = is_constant(x) + is_constant(y)
    return (None, "one of the two is constant", "both are constant")[num_constant]


@dataclass(frozen=True)
class _Kind:
    """How a coefficient varies.

    Attributes:
        variance: of Fisher's z, times the points less three.
        num_given: variables that are held fixed; each costs a point.
    """

    variance: float = 1.0
    num_given: int = 0


_PLAIN = _Kind()
_OF_RANKS = _Kind(variance=1.06)  # Fieller, Hartley and Pearson 1957
_GIVEN_ONE = _Kind(num_given=1)


def _coefficients(
    statistic: Statistic, num_points: int, *, kinds: Sequence[_Kind]
) -> list[Coefficient | None]:
    """The values of a statistic as coefficients; None for one that the points do not have."""
    if num_points < MIN_POINTS:
        return [None for _ in kinds]
    values = statistic(np.ones((num_points, 1)))[:, 0].tolist()
    found: list[Coefficient | None] = []
    resampled = bootstrap(statistic, num_points=num_points)
    for value, drawn, kind in zip(values, resampled, kinds, strict=True):
        num_free = num_points - kind.num_given
        if math.isfinite(value) and num_free >= MIN_POINTS:
            fisher = _fisher(value, num_free, variance=kind.variance)
            is_exact = abs(value) > _WHOLE and num_free > MIN_POINTS
            found.append(Coefficient(value, fisher, drawn.interval, drawn.num_left_out, is_exact))
        else:
            found.append(None)
    return found


def _fisher(value: float, num_points: int, *, variance: float) -> Interval | None:
    """By Fisher's z; None for too few points, and for 1 and -1, whose z is infinite."""
    if num_points <= MIN_POINTS or abs(value) > _WHOLE:
        return None
    z, half = math.atanh(value), _NORMAL_97_5 * math.sqrt(variance / (num_points - 3))
    return Interval(math.tanh(z - half), math.tanh(z + half))


def conclusion(c: Correlation, *, x: str, y: str) -> str:
    """What follows from a correlation and what does not, in plain sentences.

    Args:
        c: of x and y.
        x: what the first is called inside a sentence.
        y: what the second is called.
    """
    if c.pearson is None:
        return f"No correlation of {x} and {y} can be given: {c.absence}."
    if c.pearson.interval is None:
        return _without_interval(c, c.pearson, x=x, y=y)
    if c.is_with_time:
        return " ".join([_with_time(c, c.pearson, y=y), _caution(c)])
    first = _first(c, c.pearson, x=x, y=y)
    return " ".join([first, *_by_rank(c, c.pearson), _beyond_trend(c, c.pearson, y=y), _caution(c)])


def _without_interval(c: Correlation, r: Coefficient, *, x: str, y: str) -> str:
    if r.is_exact:
        return (
            f"{_capital(x)} and {y} lie on one straight line at all {c.n:,} points"
            f" (r = {_signed(round(r.value))}); no interval can be given, and nothing more follows."
        )
    return (
        f"{_capital(x)} and {y} have r = {_signed(r.value)} over {c.n} points:"
        " too few for an interval, so nothing follows from it."
    )


def _with_time(c: Correlation, r: Coefficient, *, y: str) -> str:
    logs = "" if c.trend is None else f"; with log(steps), {_in_words(c.trend)}"
    if not r.is_told_from_zero:
        return (
            f"These {c.n:,} points do not tell whether {y} rises or falls with the steps:"
            f" {_in_words(r)}{logs}."
        )
    way = "rises" if r.value > 0 else "falls"
    return f"{_capital(y)} {way} with the steps: {_in_words(r)}, over {c.n:,} points{logs}."


def _first(c: Correlation, r: Coefficient, *, x: str, y: str) -> str:
    if not r.is_told_from_zero:
        return f"These {c.n:,} points do not tell whether {x} and {y} go together: {_in_words(r)}."
    way = "go together" if r.value > 0 else "go opposite ways"
    return f"{_capital(x)} and {y} {way}: {_in_words(r)}, over {c.n:,} points."


def _by_rank(c: Correlation, r: Coefficient) -> list[str]:
    """Where ranks tell another story than values."""
    ranks = c.spearman
    if ranks is None or ranks.is_told_from_zero == r.is_told_from_zero:
        return []
    if r.is_told_from_zero:
        return [f"Of their ranks nothing can be told ({_in_words(ranks)}): a few points carry it."]
    way = "go together" if ranks.value > 0 else "go opposite ways"
    return [f"Their ranks {way} ({_in_words(ranks)}), if not along a straight line."]


def _beyond_trend(c: Correlation, r: Coefficient, *, y: str) -> str:
    given, changes = _against(c.partial, r), _against(c.differences_given, r)
    has_given = c.partial is not None and c.partial.is_told_from_zero
    has_changes = c.differences_given is not None and c.differences_given.is_told_from_zero
    if c.is_beyond_trend:
        return (
            f"Something is left beyond a trend in log(steps): of the values ({given}) and of their"
            f" changes from one point to the next ({changes}). It may be a bend that both curves"
            " share, or something that moves both; it does not show that one causes the other."
        )
    if has_given:
        return (
            f"Something is left of the values given log(steps) ({given}), but of their changes from"
            f" one point to the next nothing can be told ({changes}): slow swings of two curves"
            " look like this even where they have nothing in common, and so does a trend that"
            " log(steps) does not describe."
        )
    if has_changes:
        return (
            f"Given log(steps), something is left of the changes from one point to the next"
            f" ({changes}), but of the values nothing can be told ({given}): what they share, if"
            " anything, does not last."
        )
    if not r.is_told_from_zero:
        return "That does not show that there is no relation."
    return _trend_alone(c, given, changes, y=y)


def _trend_alone(c: Correlation, given: str, changes: str, *, y: str) -> str:
    if c.trend is None or not c.trend.is_told_from_zero:
        return (
            f"Given log(steps), neither what is left of the values ({given}) nor of their changes"
            f" from one point to the next ({changes}) can be told from nothing: these points do not"
            " tell a relation from a trend."
        )
    told = (
        "This is a trend alone: both change with training time, and given log(steps) neither what"
        f" is left of the values ({given}) nor of their changes from one point to the next"
        f" ({changes}) can be told from nothing."
    )
    if c.differences is not None and c.differences.is_told_from_zero:
        told += (
            f" Before log(steps) is taken out the changes have r = {_signed(c.differences.value)},"
            " as those of any two curves have that level off."
        )
    return f"{told} log(steps) alone goes with {y} at r = {_signed(c.trend.value)}."


def _caution(c: Correlation) -> str:
    if c.n < FEW_POINTS:
        return (
            f"These are {c.n} points of one run; checkpoints of one run are not independent,"
            " so the intervals are too narrow."
        )
    return "Checkpoints of one run are not independent, so the intervals are too narrow."


def _in_words(one: Coefficient) -> str:
    if one.interval is None:
        return f"r = {_signed(one.value)}"
    return f"r = {_signed(one.value)} (95 % interval {_ends(one.interval)})"


def _against(one: Coefficient | None, r: Coefficient) -> str:
    """A coefficient within brackets, with a remark where its sign is not that of r."""
    if one is None:
        return "no r can be given"
    interval = "no interval" if one.interval is None else _ends(one.interval)
    is_other_way = one.is_told_from_zero and one.value * r.value < 0
    remark = ", the other way round" if is_other_way else ""
    return f"r = {_signed(one.value)}, {interval}{remark}"


def _ends(interval: Interval) -> str:
    return f"{_signed(interval.low)} to {_signed(interval.high)}"


def _signed(value: float) -> str:
    """Three digits behind the point, with a true minus sign, and no minus before zeros."""
    words = f"{value:.3f}" if isinstance(value, float) else str(value)
    return words.replace("-", "" if float(words) == 0 else "\N{MINUS SIGN}")


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
