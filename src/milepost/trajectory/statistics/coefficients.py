"""Correlation coefficients as functions of weights: how often each point counts.

With weights of one they are the coefficient, with the draws of a resample its bootstrap value,
and with one weight of zero what the jackknife needs.
"""

from __future__ import annotations

import numpy as np

from milepost.trajectory.statistics.bootstrap import Statistic

_ROUNDING = 1e-12  # a spread this small beside the values is rounding
_SMALLEST = 1e-10  # of a variance whose whole is about 1


def is_constant(values: np.ndarray) -> bool:
    """Whether finite values differ by no more than rounding."""
    largest = float(np.max(np.abs(values), initial=0.0))
    # Divided first: the difference of two huge numbers may not be finite.
    return largest == 0 or float(np.ptp(values / largest)) <= _ROUNDING


def product_moment(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Pearson's r of values float64[N]; NaN where one side is constant."""
    moments = _Moments(x, y)
    return lambda weights: moments.correlations(weights)


def with_control(x: np.ndarray, y: np.ndarray, control: np.ndarray) -> Statistic:
    """Of values float64[N]: r of x and y with the control held fixed, and r of control and y.

    The first is NaN where x or y is a straight line of the control: nothing of it is left.
    """
    moments = _Moments(x, y, control)

    def statistic(weights: np.ndarray) -> np.ndarray:
        both, with_x, with_y = moments.correlations(weights)
        partial = _ratio(both - with_x * with_y, 1 - with_x**2, 1 - with_y**2)
        return np.stack([partial, with_y])

    return statistic


def of_ranks(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Spearman's coefficient of values float64[N], ties at their average rank."""
    ranks_x, ranks_y = _Ranks(x), _Ranks(y)

    def statistic(weights: np.ndarray) -> np.ndarray:
        size = np.maximum(weights.sum(axis=0), 1)
        # Of average ranks the mean is known; divided by the size they spread by about 1.
        x_ranks = (ranks_x.of(weights) - (size + 1) / 2) / size
        y_ranks = (ranks_y.of(weights) - (size + 1) / 2) / size
        weighted = weights * x_ranks
        shared = np.einsum("nk,nk->k", weighted, y_ranks) / size
        spread_x = np.einsum("nk,nk->k", weighted, x_ranks) / size
        spread_y = np.einsum("nk,nk->k", weights, y_ranks**2) / size
        return _ratio(shared, spread_x, spread_y)[None]

    return statistic


def stacked(*statistics: Statistic) -> Statistic:
    """The values of several statistics of the same points, one after the other."""
    return lambda weights: np.concatenate([one(weights) for one in statistics])


class _Moments:
    """Means, variances and products of columns, all by one matrix product."""

    def __init__(self, *columns: np.ndarray) -> None:
        known = [_standardized(column) for column in columns]
        self._pairs = [(i, j) for i in range(len(known)) for j in range(i + 1, len(known))]
        products = [known[i] * known[j] for i, j in self._pairs]
        squares = [one**2 for one in known]
        self._rows = np.stack([np.ones(len(columns[0])), *known, *squares, *products])
        self._num = len(known)

    def correlations(self, weights: np.ndarray) -> np.ndarray:
        """r of each pair of columns, float64[pairs, K]: of three 01, 02, 12."""
        sums = self._rows @ weights
        of_all = sums[1:] / np.maximum(sums[0], 1)
        means, squares, products = np.split(of_all, [self._num, 2 * self._num])
        spreads = squares - means**2
        return np.stack(
            [
                _ratio(product - means[i] * means[j], spreads[i], spreads[j])
                for product, (i, j) in zip(products, self._pairs, strict=True)
            ]
        )


class _Ranks:
    """Ranks of the points of a resample, without sorting it: weights are counted in order."""

    def __init__(self, values: np.ndarray) -> None:
        self._order = np.argsort(values, kind="stable")
        _, self._group = np.unique(values, return_inverse=True)
        self._starts = np.flatnonzero(np.diff(self._group[self._order], prepend=-1))

    def of(self, weights: np.ndarray) -> np.ndarray:
        """The rank of each point, float64[N, K]; points that were not drawn have one too."""
        in_group = weights[self._order]
        if len(self._starts) < len(self._order):  # there are ties
            in_group = np.add.reduceat(in_group, self._starts, axis=0)
        ranks = np.cumsum(in_group, axis=0) - (in_group - 1) / 2
        return ranks[self._group]


def _standardized(values: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1; zeros where the values are constant."""
    if is_constant(values):
        return np.zeros_like(values)
    scaled = values / np.max(np.abs(values))
    centered = scaled - scaled.mean()
    return centered / np.sqrt(np.mean(centered**2))


def _ratio(shared: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """shared / sqrt(one * other) within -1 and 1; NaN where one of the two is as good as 0."""
    is_sound = (one > _SMALLEST) & (other > _SMALLEST)
    below = np.sqrt(np.where(is_sound, one * other, 1.0))
    return np.where(is_sound, np.clip(shared / below, -1.0, 1.0), np.nan)
