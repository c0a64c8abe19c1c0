"""Jumps upward in a series of numbers, against the values that came just before.

The level before is a median and its spread the median absolute deviation, so that the values of
one jump do not hide the next. `robust_z` is the one definition of how far a value stands out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

MIN_HISTORY = 20
"""Values before the first one that can be judged."""

RELATIVE_FLOOR = 1e-3
"""Least spread, as a share of the level: a series that hardly moves has no jumps of nothing."""

RECOVERY_Z = 3.0
RECOVERY_VALUES = 5
"""A jump is over where the values come back within `RECOVERY_Z` and so many more stay there."""

DEVIATIONS_PER_MAD = 1.4826  # of a normal distribution: 1 / its upper quartile
_MARGIN = 1e-9  # of the quick look, for the rounding of the exact one


@dataclass(frozen=True)
class Spike:
    """One jump; first, peak and recovered are places in the series.

    Attributes:
        first: where the values first stood out.
        peak: of the highest value until the jump was over.
        recovered: the first value that was back to stay; None where none was.
        level: median before the jump.
        height: of the peak over the level, in the unit of the values.
        z: the same in robust standard deviations.
    """

    first: int
    peak: int
    recovered: int | None
    level: float
    height: float
    z: float


def robust_z(value: float, window_values: np.ndarray | Sequence[float]) -> float:
    """How far a value lies above the values before it, in robust standard deviations.

    Args:
        value: finite.
        window_values: the values before it, at least one, all finite.

    Returns:
        (value - median) / (1.4826 * median absolute deviation), where the divisor is no less than
        `RELATIVE_FLOOR` of the median; 0 where both are 0, since nothing is known of the spread.
    """
    level, spread = _level(np.asarray(window_values, dtype=np.float64))
    return (float(value) - level) / spread if spread else 0.0


def find_spikes(
    values: np.ndarray | Sequence[float], *, window: int, threshold: float
) -> list[Spike]:
    """The jumps of a series, in order.

    Args:
        values: [N]; those that are not finite are passed over.
        window: values before each that it is held against; the first ones have fewer.
        threshold: robust z from which a value stands out. Values that stand out before the jump
            before them is over, and no further than a window from it, are part of that jump.
    """
    assert window >= MIN_HISTORY and threshold > RECOVERY_Z
    every = np.asarray(values, dtype=np.float64)
    places = np.flatnonzero(np.isfinite(every))
    known = every[places]
    spikes: list[Spike] = []
    last = -1
    for place in _candidates(known.tolist(), window=window, threshold=threshold):
        before = known[max(0, place - window) : place]
        if robust_z(known[place], before) <= threshold:
            continue
        if spikes and _is_part(place, spikes[-1], last=last, window=window):
            spikes[-1] = _grown(spikes[-1], place, known)
        else:
            spikes.append(_spike(place, known, before))
        last = place
    return [_placed(spike, places) for spike in spikes]


def _level(window_values: np.ndarray) -> tuple[float, float]:
    """Median and spread."""
    median = float(np.median(window_values))
    deviation = float(np.median(np.abs(window_values - median)))
    return median, max(DEVIATIONS_PER_MAD * deviation, RELATIVE_FLOOR * abs(median))


def _candidates(values: list[float], *, window: int, threshold: float) -> Iterator[int]:
    """Places that may stand out: all that do are among them.

    A value stands out only if at least half of the window lies closer to its median than the
    value's height over (1.4826 * threshold): two look-ups in a sorted window, where the exact
    spread of 45,000 windows would take most of a second.
    """
    recent: list[float] = []
    for place, value in enumerate(values):
        size = len(recent)
        if size >= MIN_HISTORY:
            median = (recent[(size - 1) // 2] + recent[size // 2]) / 2
            height = (value - median) * (1 + _MARGIN)
            if height > threshold * RELATIVE_FLOOR * abs(median):
                reach = height / (threshold * DEVIATIONS_PER_MAD)
                last = bisect_right(recent, median + reach)
                if 2 * (last - bisect_left(recent, median - reach)) >= size:
                    yield place
        insort(recent, value)
        if size == window:
            del recent[bisect_left(recent, values[place - window])]


def _spike(first: int, values: np.ndarray, before: np.ndarray) -> Spike:
    level, spread = _level(before)
    back = _first_to_stay(values, first, bound=level + RECOVERY_Z * spread)
    height = float(values[first]) - level
    return Spike(first, first, back, level=level, height=height, z=height / spread)


def _is_part(place: int, spike: Spike, *, last: int, window: int) -> bool:
    return place - last <= window and (spike.recovered is None or place < spike.recovered)


def _grown(spike: Spike, place: int, values: np.ndarray) -> Spike:
    height = float(values[place]) - spike.level
    if height <= spike.height:
        return spike
    return replace(spike, peak=place, height=height, z=spike.z * height / spike.height)


def _placed(spike: Spike, places: np.ndarray) -> Spike:
    """The spike of the finite values, at its places among all."""
    recovered = None if spike.recovered is None else int(places[spike.recovered])
    first, peak = int(places[spike.first]), int(places[spike.peak])
    return replace(spike, first=first, peak=peak, recovered=recovered)


def _first_to_stay(values: np.ndarray, start: int, *, bound: float) -> int | None:
    """The first place whose value, and `RECOVERY_VALUES` after it, are no more than the bound."""
    size = 256
    while start + RECOVERY_VALUES < len(values):
        part = values[start : start + size]
        num_within = np.cumsum(np.concatenate([[0], part <= bound]))
        stays = num_within[RECOVERY_VALUES + 1 :] - num_within[: -RECOVERY_VALUES - 1]
        found = np.flatnonzero(stays > RECOVERY_VALUES)
        if len(found):
            return start + int(found[0])
        start += len(part) - RECOVERY_VALUES
        size *= 2
    return None
