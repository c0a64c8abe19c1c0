"""Loss against tokens as a power law, in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from milepost.core.units import format_count
from milepost.runs.metric_names import TRAIN_LOSS, VAL_LOSS
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.sections.wording import interval_words, metric_words, plain
from milepost.trajectory.statistics.correlation import Interval
from milepost.trajectory.statistics.power_law import PowerLaw, fit_power_law
from milepost.trajectory.subject import Section


@dataclass(frozen=True)
class FittedLaw:
    """The law of a course's loss.

    Attributes:
        metric: of the loss that it is fitted to; empty where it is fitted to none.
        law: None where there is none.
        last_tokens: of the last point of that loss.
        refusals: (metric, why not) of the losses that could not be fitted.
    """

    metric: str
    law: PowerLaw | None
    last_tokens: float
    refusals: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LossLaw:
    """What the section shows.

    Attributes:
        formula: the fitted law; empty where there is none.
        sentences: what it says and what it does not.
    """

    formula: str
    sentences: tuple[str, ...]


def fitted_law(course: Course) -> FittedLaw:
    """Fits the validation loss, or the training loss, whose points are noisier, for want of it."""
    refusals: list[tuple[str, str]] = []
    if course.counts_answers:  # the law is of training from nothing; this one began at its base
        return FittedLaw("", None, 0.0, ())
    for metric in (VAL_LOSS, TRAIN_LOSS):
        if metric not in course.curves:
            continue
        law, last_tokens = _law_and_last(course.curves[metric])
        if isinstance(law, PowerLaw):
            return FittedLaw(metric, law, last_tokens, tuple(refusals))
        refusals.append((metric, law))
    return FittedLaw("", None, 0.0, tuple(refusals))


def loss_law_section(fitted: FittedLaw) -> Section | None:
    """The section; None where no loss is on record."""
    told = [
        f"No power law is fitted to the {metric_words(metric)}: {reason}."
        for metric, reason in fitted.refusals
    ]
    law, formula = fitted.law, ""
    if law is not None:
        formula = _formula(law)
        words = metric_words(fitted.metric)
        told += [_fit(law, words), _forecast(law, last=fitted.last_tokens), _WARNING]
    if not told:
        return None
    content = LossLaw(formula, tuple(told))
    return Section("loss-law", "Loss against tokens", "sections/loss_law.jinja", content)


def _law_and_last(curve: Curve) -> tuple[PowerLaw | str, float]:
    """The law, or why there is none, and the tokens of the last point."""
    known = np.isfinite(curve.tokens)
    if not known.any():
        return "the source does not say how many tokens were seen", 0.0
    tokens = curve.tokens[known]
    return fit_power_law(tokens, curve.values[known]), float(tokens[-1])


def _formula(law: PowerLaw) -> str:
    return (
        f"loss = {plain(law.floor, decimals=3)}"
        f" + {law.scale:.4g} × tokens^−{plain(law.exponent, decimals=3)}"
    )


def _fit(law: PowerLaw, words: str) -> str:
    told = f"Fitted to {law.n:,} points of the {words}"
    if law.num_left_out:
        told += (
            f" from {format_count(law.first_tokens)} tokens on ({law.num_left_out:,} others, too"
            " early or between these, are left out)"
        )
    return (
        f"{told}: floor {plain(law.floor, decimals=3)} nats{_within(law.floor_interval)}, exponent"
        f" {plain(law.exponent, decimals=3)}{_within(law.exponent_interval)}. The points lie"
        f" {law.rmse:.4f} nats from the curve (root mean square)."
    )


def _forecast(law: PowerLaw, *, last: float) -> str:
    loss, interval = law.predict(2 * last)
    return (
        f"For twice the tokens, {format_count(2 * last)} where the last point has"
        f" {format_count(last)}, it gives {plain(loss, decimals=3)} nats{_within(interval)}."
    )


_WARNING = (
    "This describes the curve and is no promise: a learning rate that falls pulls the loss down"
    " towards the end, which tokens alone would not, and a longer run would have another schedule."
)


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 %: {interval_words(interval, decimals=3)})"
