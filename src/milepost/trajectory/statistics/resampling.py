"""Bootstrap over rated samples: how far a mean would move with other samples of the same kind.

The draws are the same at every call, so the same ratings give the same intervals.
"""

from __future__ import annotations

import functools

import numpy as np

from milepost.trajectory.statistics.correlation import Interval

NUM_RESAMPLES = 1000
FEWEST_UNITS = 5
"""Below this a bootstrap has so few different draws that its interval is far too narrow."""


_ROUNDING = 1e-9


@functools.lru_cache(maxsize=2)  # the criteria of one comparison share their draws
def resample_counts(num_units: int, *, first: int, num: int) -> np.ndarray:
    """How often each unit is drawn, float64[num, num_units], in the resamples from `first` on."""
    rng = np.random.default_rng([num_units, first])
    drawn = rng.integers(0, num_units, (num, num_units))
    places = drawn + num_units * np.arange(num)[:, None]  # far faster than multinomial draws
    counts = np.bincount(places.ravel(), minlength=num * num_units).astype(float)
    counts.flags.writeable = False
    return counts.reshape(num, num_units)


def percentile_interval(estimates: np.ndarray) -> Interval | None:
    """The middle 95 % of float64[N]; NaN, an estimate that does not exist, is left out.

    None where most do not exist, or where they are all alike: that resampling moves nothing does
    not say that other samples would not.
    """
    there = estimates[np.isfinite(estimates)]
    if len(there) < len(estimates) / 2:
        return None
    low, high = np.percentile(there, [2.5, 97.5])
    return Interval(float(low), float(high)) if high - low > _ROUNDING else None


def mean_interval(values: np.ndarray) -> Interval | None:
    """95 % of the mean of float64[N]; None below `FEWEST_UNITS`, or where all are alike."""
    if len(values) < FEWEST_UNITS:
        return None
    drawn = resample_counts(len(values), first=0, num=NUM_RESAMPLES)
    return percentile_interval(drawn @ values / len(values))
