"""Tokens per second and time left; only training time counts as training time."""

from __future__ import annotations

import statistics
from collections import deque


class Throughput:
    """Remembers the last steps' durations."""

    def __init__(self, *, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._recent: deque[float] = deque(maxlen=20)

    def add(self, step_seconds: float) -> tuple[float, float | None]:
        """Counts one step; returns (tokens per second, share of the peak or None if unknown)."""
        self._recent.append(step_seconds)
        rate = self._tokens_per_step / step_seconds
        if self._peak_flops is None:
            return rate, None
        return rate, rate * self._flops_per_token / self._peak_flops

    def seconds_left(self, num_steps: int) -> float | None:
        """Time that `num_steps` more updates take, by the median of the last ones."""
        if not self._recent:
            return None
        return num_steps * statistics.median(self._recent)
