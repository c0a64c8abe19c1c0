"""Numbers and names as the sentences and tables of a page put them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from milepost.runs.metric_names import (
    BITS_PER_BYTE,
    GRAD_NORM,
    LEARNING_RATE,
    TRAIN_LOSS,
    VAL_LOSS,
)
from milepost.trajectory.benchmarks import METRICS, NAMES
from milepost.trajectory.statistics.correlation import Coefficient, Interval

NONE = "–"
"""Stands in a cell that has no value."""

SMALLEST_P = 1e-4
"""A smaller p-value is told as less than this: its digits say nothing more."""

_METRIC_WORDS = {
    TRAIN_LOSS: "training loss",
    VAL_LOSS: "validation loss",
    BITS_PER_BYTE: "bits per byte",
    GRAD_NORM: "gradient norm",
    LEARNING_RATE: "learning rate",
}
_IN_NATS = (TRAIN_LOSS, VAL_LOSS)


def benchmark_of(metric: str) -> tuple[str, str] | None:
    """('hellaswag', 'acc_norm') of 'eval/hellaswag/acc_norm'; None for what is no score."""
    group, _, rest = metric.partition("/")
    benchmark, _, name = rest.rpartition("/")
    return (benchmark, name) if group == "eval" and benchmark and name else None


def is_fraction(metric: str) -> bool:
    """Whether the metric is an accuracy, told in percent."""
    score = benchmark_of(metric)
    return score is not None and score[1] in METRICS


def metric_words(metric: str) -> str:
    """What a metric is called inside a sentence: 'validation loss', 'HellaSwag'."""
    score = benchmark_of(metric)
    if score is None:
        return _METRIC_WORDS.get(metric, metric)
    name = NAMES.get(score[0], score[0])
    return name if score[1] in METRICS else f"{name} {score[1]}"


def with_unit(metric: str) -> str:
    """The metric as a heading of a column or row, with what it is counted in."""
    words = metric_words(metric)
    score = benchmark_of(metric)
    if score is not None and score[1] in METRICS:
        return f"{words} ({score[1]}, %)"
    return f"{capitalized(words)} (nats)" if metric in _IN_NATS else capitalized(words)


def decimals_of(metric: str, values: Iterable[float]) -> int:
    """Decimals with which all values of a metric are told.

    A source that prints 2.47 has not measured 2.4700: a loss that is known to two decimals is told
    with two, any other with four.
    """
    if is_fraction(metric):
        return 1
    return 4 if any(abs(value - round(value, 2)) > 1e-6 for value in values) else 2


def value_words(metric: str, value: float, *, decimals: int) -> str:
    """A value of a metric without its unit, an accuracy in percent."""
    return plain(100 * value if is_fraction(metric) else value, decimals=decimals)


def signed(value: float, *, decimals: int) -> str:
    """'+1.20', '−0.35', '0.00'."""
    told = f"{value:+.{decimals}f}"
    return told[1:] if float(told) == 0 else told.replace("-", "−")


def plain(value: float, *, decimals: int) -> str:
    """'0.930', '−0.956'."""
    told = f"{value:.{decimals}f}"
    return (told.lstrip("-") if float(told) == 0 else told).replace("-", "−")


def interval_words(interval: Interval, *, decimals: int, scale: float = 1.0) -> str:
    """'0.72 to 0.98'."""
    low, high = scale * interval.low, scale * interval.high
    return f"{plain(low, decimals=decimals)} to {plain(high, decimals=decimals)}"


def coefficient_words(coefficient: Coefficient | None) -> str:
    """The value, then a line for each interval it has."""
    if coefficient is None:
        return NONE
    lines = [plain(coefficient.value, decimals=3)]
    for name, interval in (("Fisher", coefficient.fisher), ("BCa", coefficient.bootstrap)):
        if interval is not None:
            lines.append(f"{name} {interval_words(interval, decimals=2)}")
    return "\n".join(lines)


def p_words(p: float) -> str:
    """'0.032', '< 0.0001'."""
    return f"< {SMALLEST_P:g}" if p < SMALLEST_P else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def capitalized(words: str) -> str:
    """The first letter large, the others as they are."""
    return words[:1].upper() + words[1:]


def plural(count: int, noun: str) -> str:
    """'1 step', '2 steps', '1,000 steps'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def enumerate_words(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def times(count: int) -> str:
    """'0 times', 'once', 'twice', '3 times'."""
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
