"""Checkpoints whose scores stand out from their neighbors'.

A checkpoint that was damaged, mixed up or scored wrongly lies off the curve that those before and
after it make, on several benchmarks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from milepost.core.spikes import DEVIATIONS_PER_MAD
from milepost.trajectory.benchmarks import Series

THRESHOLD = 4.5
"""Of all benchmarks together, as a normal deviate: by chance 1 checkpoint in 300,000."""

BENCHMARK_THRESHOLD = 3.0
"""From which a benchmark is named as one on which the checkpoint stands out."""

MIN_CHECKPOINTS = 7
"""Of a series, so that its own scatter can be told."""

MAX_FOUND = 20
MAX_NAMED = 3

_NUM_SIDE = 2  # neighbors on each side
_MEDIAN_OF_FOUR = 0.298  # its variance, of four normal draws, over that of one of them


@dataclass(frozen=True)
class OddCheckpoint:
    """A checkpoint that does not fit between its neighbors.

    Attributes:
        benchmarks: on which it stands out, by the name that records carry.
        z: of all its benchmarks together, as a normal deviate; at least `THRESHOLD`.
        words: what is odd, for people.
    """

    step: int
    benchmarks: tuple[str, ...]
    z: float
    words: str


@dataclass(frozen=True)
class _Residual:
    """One score against what its neighbors make one expect; fractions."""

    series: Series
    score: float
    expected: float
    z: float


def odd_checkpoints(series: Sequence[Series]) -> list[OddCheckpoint]:
    """The checkpoints that stand out, by step; no more than `MAX_FOUND`.

    The one that stands out most is taken out before the others are judged, so that it does not
    make its neighbors look odd. The first and the last score of a series are not judged: they have
    neighbors on one side only.

    Args:
        series: of different benchmarks.
    """
    found: list[OddCheckpoint] = []
    while len(found) < MAX_FOUND:
        left_out = {checkpoint.step for checkpoint in found}
        by_step: dict[int, list[_Residual]] = {}
        for one in series:
            for step, residual in _residuals(one, left_out=left_out):
                by_step.setdefault(step, []).append(residual)
        oddest = max(by_step, key=lambda step: _joint_z(by_step[step]), default=None)
        if oddest is None or _joint_z(by_step[oddest]) < THRESHOLD:
            break
        found.append(_odd(oddest, by_step[oddest]))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _residuals(series: Series, *, left_out: set[int]) -> list[tuple[int, _Residual]]:
    points = series.points(series.latest.main_metric)
    points = [(step, score) for step, score in points if step not in left_out]
    if len(points) < MIN_CHECKPOINTS:
        return []
    values = np.array([score.value for _, score in points])
    expected = _expected(np.log1p([float(step) for step, _ in points]), values)
    residuals = values - expected
    is_judged = np.isfinite(residuals)
    scatter = DEVIATIONS_PER_MAD * float(np.median(np.abs(residuals[is_judged])))
    found = []
    for place in np.flatnonzero(is_judged).tolist():
        step, score = points[place]
        error = (score.stderr or 0.0) * (1 + _MEDIAN_OF_FOUR) ** 0.5
        if spread := max(error, scatter):
            z = float(residuals[place]) / spread
            found.append((step, _Residual(series, score.value, float(expected[place]), z)))
    return found


def _expected(places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The median of two neighbors on each side, along their own slope; NaN at both ends.

    Args:
        places: log(step + 1), float64[N].
        values: float64[N].
    """
    shifts = [shift for shift in range(-_NUM_SIDE, _NUM_SIDE + 1) if shift]
    near = np.stack([_shifted(values, shift) for shift in shifts])
    where = np.stack([_shifted(places, shift) for shift in shifts]) - places
    with np.errstate(invalid="ignore"):
        before, after = np.split(near, 2)
        rise = _mean(after) - _mean(before)
        run = _mean(where[_NUM_SIDE:]) - _mean(where[:_NUM_SIDE])
        level = near - where * (rise / run)
    expected = np.full(len(values), np.nan)
    expected[1:-1] = np.nanmedian(level[:, 1:-1], axis=0)
    return expected


def _shifted(values: np.ndarray, shift: int) -> np.ndarray:
    """Each place's neighbor so many places on; NaN beyond the ends."""
    moved = np.full(len(values), np.nan)
    if shift > 0:
        moved[:-shift] = values[shift:]
    else:
        moved[-shift:] = values[:shift]
    return moved


def _mean(values: np.ndarray) -> np.ndarray:
    """Of the neighbors that are there; NaN where none is."""
    is_there = np.isfinite(values)
    return np.where(is_there, values, 0.0).sum(axis=0) / is_there.sum(axis=0)


def _joint_z(residuals: Sequence[_Residual]) -> float:
    """The sum of the squared z as a normal deviate (Wilson and Hilferty 1931)."""
    num = len(residuals)
    mean_square = sum(one.z**2 for one in residuals) / num
    variance = 2 / (9 * num)
    return float((mean_square ** (1 / 3) - (1 - variance)) / variance**0.5)


def _odd(step: int, residuals: Sequence[_Residual]) -> OddCheckpoint:
    ranked = sorted(residuals, key=lambda one: -abs(one.z))
    named = [one for one in ranked if abs(one.z) >= BENCHMARK_THRESHOLD] or ranked[:1]
    words = [_words(one) for one in named[:MAX_NAMED]]
    if len(named) > MAX_NAMED:
        words.append(f"and {len(named) - MAX_NAMED} more")
    return OddCheckpoint(
        step=step,
        benchmarks=tuple(one.series.setting.benchmark for one in named),
        z=_joint_z(residuals),
        words="; ".join(words),
    )


def _words(one: _Residual) -> str:
    score, expected = f"{100 * one.score:.1f} %", f"{100 * one.expected:.1f} %"
    return f"{one.series.setting.name} {score} where its neighbors lead to {expected}"
