"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from milepost.config.schema import Config


def learning_rate(step: int, *, config: Config) -> float:
    """The learning rate of update `step` + 1.

    Warm-up rises linearly and reaches the highest rate at `warmup_steps` (the first update
    already moves: (step + 1) / (warmup_steps + 1), as the authors' script does). The decay
    reaches `min_learning_rate` at `total_steps`.

    Args:
        step: updates done so far.
        config: schedule, highest rate and total steps.
    """
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
