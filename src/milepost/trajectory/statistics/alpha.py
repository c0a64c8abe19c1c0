"""Krippendorff's alpha: agreement of any number of raters, with values missing.

After K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), whose worked examples
the tests hold. alpha = 1 - D_o / D_e: the disagreement within the units over what chance would
give. Its three metrics used here are one: a squared distance between codes of the values. A value
is its own code (interval data), its midrank among all values (ordinal data: the 2011 formula is the
squared difference of midranks), or one 1 among zeros (nominal data).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from milepost.trajectory.statistics.correlation import Interval
from milepost.trajectory.statistics.resampling import (
    FEWEST_UNITS,
    NUM_RESAMPLES,
    percentile_interval,
    resample_counts,
)

Metric = Literal["nominal", "ordinal", "interval"]

_MOST_CELLS = 1 << 20
"""Of one table of resamples and units, to bound memory."""


@dataclass(frozen=True)
class Alpha:
    """Krippendorff's alpha.

    Attributes:
        value: 1: all alike; 0: as chance would have it; below: less alike than that.
        interval: 95 %, by a bootstrap over the units; None where there are too few, or where
            all resamples give the same.
    """

    value: float
    interval: Interval | None


def krippendorff_alpha(
    values: np.ndarray, *, metric: Metric, num_resamples: int = NUM_RESAMPLES
) -> Alpha | str:
    """How far raters agree on units.

    Args:
        values: float64[raters, units]; NaN where a rater did not rate a unit.
        metric: what the values are: names, an order, or numbers.
        num_resamples: of the bootstrap; 0: no interval.

    Returns:
        Alpha, or in words why there is none.
    """
    is_there = np.isfinite(values)
    if (is_there.any(axis=1)).sum() < 2:
        return "one rater only"
    units = values[:, is_there.sum(axis=0) >= 2]
    if units.shape[1] == 0:
        return "nothing was rated twice"
    levels = np.unique(units[np.isfinite(units)])
    if len(levels) == 1:
        return "all scores are the same, which shows neither agreement nor disagreement"
    counts_UV = np.stack([(units == level).sum(axis=0) for level in levels], axis=1).astype(float)
    num_units = len(counts_UV)
    value = float(_alphas(counts_UV, levels, np.ones((1, num_units)), metric)[0])
    if num_units < FEWEST_UNITS or num_resamples == 0:
        return Alpha(value, None)
    num_a_time = max(1, _MOST_CELLS // num_units)
    estimates = []
    for first in range(0, num_resamples, num_a_time):
        num = min(num_a_time, num_resamples - first)
        drawn_RU = resample_counts(num_units, first=first, num=num)
        estimates.append(_alphas(counts_UV, levels, drawn_RU, metric))
    return Alpha(value, percentile_interval(np.concatenate(estimates)))


def _alphas(
    counts_UV: np.ndarray, levels: np.ndarray, drawn_RU: np.ndarray, metric: Metric
) -> np.ndarray:
    """Alpha of each resample, float64[R]; NaN where all values in it are the same.

    Args:
        counts_UV: how many raters gave unit u the value v.
        levels: the values, ascending.
        drawn_RU: how often unit u is in resample r.
        metric: as for `krippendorff_alpha`.
    """
    raters_U = counts_UV.sum(axis=1)
    totals_RV = drawn_RU @ counts_UV
    num_R = totals_RV.sum(axis=1)
    if metric == "nominal":
        within_RU = (raters_U**2 - (counts_UV**2).sum(axis=1))[None]
        expected_R = num_R**2 - (totals_RV**2).sum(axis=1)
    else:
        codes_RV = _codes(levels, totals_RV, metric)
        sums_RU, squares_RU = codes_RV @ counts_UV.T, codes_RV**2 @ counts_UV.T
        within_RU = 2 * (raters_U * squares_RU - sums_RU**2)
        sum_R = (totals_RV * codes_RV).sum(axis=1)
        expected_R = 2 * (num_R * (totals_RV * codes_RV**2).sum(axis=1) - sum_R**2)
    within_RU = np.broadcast_to(within_RU / (raters_U - 1), drawn_RU.shape)
    observed_R = np.einsum("ru,ru->r", drawn_RU, within_RU) / num_R
    # The sums are of squared whole or half numbers: what is left of no variation is rounding.
    is_varied = expected_R > 1e-9 * num_R**2
    expected_R = np.where(is_varied, expected_R, 1.0) / (num_R * (num_R - 1))
    return np.where(is_varied, 1 - observed_R / expected_R, np.nan)


def _codes(levels: np.ndarray, totals_RV: np.ndarray, metric: Metric) -> np.ndarray:
    """A number for each value; less their mean, so that differences of squares stay exact."""
    if metric == "interval":
        return (levels - levels.mean())[None]
    midranks_RV = np.cumsum(totals_RV, axis=1) - totals_RV / 2
    return midranks_RV - totals_RV.sum(axis=1, keepdims=True) / 2
