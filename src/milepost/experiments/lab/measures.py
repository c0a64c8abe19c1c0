"""What a restart did to a curve: spike, recovery and the difference at the end, over the seeds.

Everything is a difference from the parent's uninterrupted curve at the same place, paired by seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from milepost.core.spikes import DEVIATIONS_PER_MAD
from milepost.trajectory.statistics.bootstrap import Interval

NOISE_DEVIATIONS = 2.0
"""A curve is back in the noise where it is no more than so many deviations above the parent's."""

HELD_VALUES = 10
"""So many values in a row must be back (of a short curve a quarter): of hundreds of values a few
are outside by noise alone, so that the last one outside says nothing."""

END_FRACTION = 0.1
"""The last part of the steps, whose mean difference is the difference at the end."""

# Quantiles 0.975 of Student's t for 1 to 9 degrees of freedom (Fisher and Yates 1938, table III).
_T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Curve:
    """One metric of one run, by updates after the restart.

    Attributes:
        steps: int64 [N], ascending; 0 is the restored checkpoint itself.
        values: float64 [N], finite.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Measure:
    """What one restart of one seed did to one metric.

    Attributes:
        start: the first difference; of a validation loss that of the restored weights themselves,
            which is zero unless they are measured on other text.
        spike: highest difference from the parent, in the metric's unit.
        spike_step: updates after the restart at which it lay.
        noise: standard deviation that the difference would have by noise alone.
        spike_z: the spike in those; None where the parent has no noise.
        recovered_after: updates until the curve was back in the noise after its spike; None: it
            was not.
        end: mean difference over the last tenth.
        is_equal: whether every value is the parent's, bit for bit.
    """

    start: float
    spike: float
    spike_step: int
    noise: float
    spike_z: float | None
    recovered_after: int | None
    end: float
    is_equal: bool


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; the interval is None for one seed."""

    value: float
    interval: Interval | None
    num_seeds: int


def noise_of(values: np.ndarray) -> float:
    """The standard deviation of a curve about its own course.

    From the differences of neighbors, which a slow course does not touch (von Neumann 1941), by
    their median deviation, which a few jumps do not touch.

    Args:
        values: float64 [N].
    """
    steps = np.diff(values)
    if not len(steps):
        return 0.0
    spread = DEVIATIONS_PER_MAD * float(np.median(np.abs(steps - np.median(steps))))
    return spread / math.sqrt(2)


def smoothed(curve: Curve, *, width: int) -> Curve:
    """Means of `width` neighbors, each at the last of them; the first ones of what there is."""
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    ends = np.arange(1, len(curve.values) + 1)
    begins = np.maximum(ends - width, 0)
    return Curve(curve.steps, (sums[ends] - sums[begins]) / (ends - begins))


def difference(arm: Curve, parent: Curve) -> Curve:
    """The arm less the parent, where both have a value."""
    steps, ours, theirs = np.intersect1d(
        arm.steps, parent.steps, assume_unique=True, return_indices=True
    )
    return Curve(steps, arm.values[ours] - parent.values[theirs])


def noise_between(parent: Curve, *, width: int, are_apart: bool) -> float:
    """The standard deviation that an arm's difference from its parent has by noise alone.

    Args:
        parent: of the run that was not interrupted.
        width: values that are averaged, taken as independent.
        are_apart: whether arm and parent see other batches, so that both of them add noise; of
            the same batches much of it cancels, and one curve's is more than there is.
    """
    of_one = noise_of(parent.values) / math.sqrt(width)
    return of_one * math.sqrt(2) if are_apart else of_one


def measure(arm: Curve, parent: Curve, *, width: int, noise: float) -> Measure | None:
    """Compares two curves; None where they have no place in common.

    Args:
        arm: of the restart.
        parent: of the run that was not interrupted.
        width: values that are averaged first, so that one noisy value is no spike.
        noise: see `noise_between`.
    """
    raw = difference(arm, parent)
    if not len(raw.steps):
        return None
    both = smoothed(raw, width=width)
    top = int(np.argmax(both.values))
    spike = float(both.values[top])
    last = max(1, round(END_FRACTION * len(raw.steps)))
    return Measure(
        start=float(raw.values[0]),
        spike=spike,
        spike_step=int(both.steps[top]),
        noise=noise,
        spike_z=spike / noise if noise else None,
        recovered_after=_recovered_after(both, top=top, limit=NOISE_DEVIATIONS * noise),
        end=float(raw.values[-last:].mean()),
        is_equal=not np.any(raw.values),
    )


def _recovered_after(above: Curve, *, top: int, limit: float) -> int | None:
    """The first step after the spike from which `HELD_VALUES` are at most `limit`."""
    is_back = above.values <= limit
    if is_back[top]:
        return 0
    held = min(HELD_VALUES, max(1, len(is_back) // 4))
    for place in range(top + 1, len(is_back) - held + 1):
        if is_back[place : place + held].all():
            return int(above.steps[place])
    return None


def mean_of(values: list[float]) -> Mean:
    """The mean over seeds with the 95 % interval of Student's t; of one seed no interval."""
    array = np.asarray(values, dtype=np.float64)
    value, count = float(array.mean()), len(array)
    if count < 2:
        return Mean(value, None, count)
    half = _T_95[count - 2] * float(array.std(ddof=1)) / math.sqrt(count)
    return Mean(value, Interval(value - half, value + half), count)
