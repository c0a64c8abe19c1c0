"""A model's way as curves, from wherever its numbers come: a run, an import, a published table.

What the report lays one over another is this; what only a run has stays in `collect.Trajectory`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Axis = Literal["steps", "tokens", "flops"]

MAX_TOKENS = 2.0**62
"""A larger number is no count of tokens; an axis of such numbers cannot be drawn."""


@dataclass(frozen=True)
class Curve:
    """One metric against steps and tokens; all arrays of one length N, in order.

    Attributes:
        steps: updates, float64[N]; NaN where the source does not say.
        tokens: target tokens seen, float64[N]; NaN where the source does not say.
        values: float64[N], finite.
        stderrs: standard errors, float64[N]; NaN where unknown.
    """

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    stderrs: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Course:
    """All curves of one model.

    Attributes:
        name: as the page calls it.
        source: where the numbers come from, in words.
        curves: metric name (see `runs.metric_names`) to curve; none is empty.
        flops_per_token: of training; None where the model's shape is not known.
        flops_per_step: of a fine-tuning, in place of the former: an update reads whole
            conversations, and only the tokens of answers are counted as seen.
        restarts: steps at which training was started anew.
        notes: what a reader of the numbers has to know, a sentence each.
        is_baseline: whether it is drawn as levels (dotted), not as a curve.
    """

    name: str
    source: str
    curves: dict[str, Curve]
    flops_per_token: float | None = None
    flops_per_step: float | None = None
    restarts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    is_baseline: bool = field(default=False)

    def positions(self, metric: str, *, axis: Axis) -> np.ndarray:
        """Where a curve's values lie on an axis, float64[N]; NaN where that is not known."""
        curve = self.curves[metric]
        if axis == "steps":
            return curve.steps
        if axis == "tokens":
            return curve.tokens
        return self.flops(steps=curve.steps, tokens=curve.tokens)

    def flops(self, *, steps: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Training FLOPs up to so many steps and tokens, float64[N]; NaN where unknown."""
        if self.flops_per_step is not None:
            return steps * self.flops_per_step
        return tokens * (np.nan if self.flops_per_token is None else self.flops_per_token)

    @property
    def counts_answers(self) -> bool:
        """Whether its tokens are those of answers alone."""
        return self.flops_per_step is not None
