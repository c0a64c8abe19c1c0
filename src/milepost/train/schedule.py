"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from milepost.config.schema import Config


def learning_rate(step: int, *, config: Config) -> float:
    """The learning rate of update `step` + 1.

    Warm-up rises linearly and reaches the highest rate at `warmup_steps` (the first update
    already moves: (step + 1) / (warmup_steps + 1), as the authors' script does). The decay
    reaches `min_learning_rate` at `total_steps`. A second warm-up, of a run that restores no
    optimizer, rises from `rewarm_at_step` on to what the schedule has without it.

    Args:
        step: updates done so far.
        config: schedule, highest rate and total steps.
    """
    planned = _planned(step, config=config)
    begin, length = config.schedule.rewarm_at_step, config.schedule.rewarm_steps
    if begin is None or not begin <= step < begin + length:
        return planned
    return planned * (step - begin + 1) / (length + 1)


def _planned(step: int, *, config: Config) -> float:
    """The rate as if there were no second warm-up."""
    schedule, total = config.schedule, config.train.total_steps
    high, low = config.optimizer.learning_rate, schedule.min_learning_rate
    if step < schedule.warmup_steps:
        return high * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return high
    start = schedule.warmup_steps
    if schedule.name == "warmup_stable_decay":
        start = total - (schedule.decay_steps or 0)
    done = (step - start) / max(1, total - start)
    done = min(max(done, 0.0), 1.0)
    if schedule.name == "cosine":
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))
    return high + (low - high) * done
