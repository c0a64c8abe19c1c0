"""Fields of records, read with suspicion: a foreign value is None, never an error."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np


def finite(value: Any) -> float | None:
    """A number as it is, None for everything else: text, truth values, NaN, infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def all_finite(values: list[Any]) -> list[float | None]:
    """`finite` of each; quick where all are numbers or None, as in a history without a fault."""
    if set(map(type, values)) <= {float, type(None)}:
        numbers = np.array(values, dtype=np.float64)
        if np.isfinite(numbers).sum() == len(values) - values.count(None):
            return values
    return [finite(value) for value in values]


def whole(value: Any) -> int | None:
    """A count that is not negative, None for everything else."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if is_count else None


def text(value: Any) -> str | None:
    """A text as it is, None for everything else."""
    return value if isinstance(value, str) else None


def clock_seconds(value: Any) -> float | None:
    """Seconds since 1970 of an ISO 8601 time, None for everything else."""
    if not isinstance(value, str):
        return None
    try:
        return datetime.datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError):
        return None
