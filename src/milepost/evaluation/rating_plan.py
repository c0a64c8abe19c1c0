"""What a rater sees, in which order: steps and prompts shuffled, some completions shown twice.

The order follows from the rater's name alone, so whoever comes back goes on where they stopped.
Must not import torch: the rating page and the judge read it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from milepost.core.errors import UsageError
from milepost.runs.steps import describe_steps, wanted_steps

FARTHEST_APART = 10
"""Presentations between the two of one sample, where there are enough of them."""


@dataclass(frozen=True)
class Presentation:
    """One completion as it is put before a rater, who is told neither step nor model.

    Attributes:
        sample_id: of samples.jsonl; not for the rater's eyes.
        prompt: what the model was given.
        completion: what it wrote.
        repeat: 0 the first time, 1 the second.
    """

    sample_id: str
    prompt: str
    completion: str
    repeat: int


def rating_plan(
    samples: Sequence[dict[str, Any]],
    *,
    seed: str,
    fraction_repeated: float,
    limit: int | None = None,
    steps: Collection[int] | None = None,
) -> list[Presentation]:
    """What one rater sees, in order.

    Which samples a limit leaves does not depend on the rater, so that raters share them; their
    order, and which are shown twice, does. Samples that are recorded later find their places
    among the others without changing the order of those.

    Args:
        samples: lines of samples.jsonl; what has no id, prompt or completion is left out, and of
            two with one id one.
        seed: the rater's name.
        fraction_repeated: 0 to 1, of the samples; at least one where it is above 0.
        limit: at most so many samples: of each prompt in turn, evenly over the steps.
        steps: of these steps only; None: of all.

    Returns:
        Each sample once with `repeat` 0, and the repeated ones again, later, with 1. The two are
        at least min(10, number of samples // 2) places apart.
    """
    chosen = _limited(_rateable(samples, steps=steps), limit=limit)
    order = sorted(chosen, key=lambda sample: _draw(seed, "order", sample["sample_id"]))
    firsts = [_presentation(sample, repeat=0) for sample in order]
    num_repeated = min(len(order), round(fraction_repeated * len(order)))
    if fraction_repeated > 0 and order:
        num_repeated = max(1, num_repeated)
    return _with_repeats(firsts, num_repeated=num_repeated, rng=random.Random(_draw(seed, "rng")))


def sample_steps(samples: Sequence[dict[str, Any]], *, text: str | None) -> list[int] | None:
    """The steps that a `--steps` option means, of those that have a sample.

    Args:
        samples: lines of samples.jsonl.
        text: all, latest, every:N or steps with commas between; None: no option was given.

    Returns:
        Steps, ascending; None where no option was given.

    Raises:
        UsageError: the text is not of that form, or there is no sample of such a step.
    """
    if text is None:
        return None
    available = sorted({sample["step"] for sample in _rateable(samples, steps=None)} - {None})
    wanted = wanted_steps(text, available=available)
    missing = [step for step in wanted if step not in available]
    if missing or not wanted:
        what = f"step {missing[0]}" if missing else f"--steps {text}"
        raise UsageError(
            f"there is no sample of {what}", hint=describe_steps(available, what="samples")
        )
    return wanted


def _rateable(
    samples: Sequence[dict[str, Any]], *, steps: Collection[int] | None
) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        texts = [sample.get(name) for name in ("sample_id", "prompt", "completion")]
        if not all(isinstance(text, str) for text in texts):
            continue
        step = sample.get("step")
        step = step if isinstance(step, int) and not isinstance(step, bool) else None
        if steps is None or step in steps:
            found.setdefault(sample["sample_id"], sample | {"step": step})
    return list(found.values())


def _limited(samples: list[dict[str, Any]], *, limit: int | None) -> list[dict[str, Any]]:
    """At most `limit` samples: the first of every step, the second of every step, and so on."""
    if limit is None or len(samples) <= limit:
        return samples
    by_step: dict[int | None, list[dict[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    queues = [by_step[step] for step in sorted(by_step, key=lambda step: (step is None, step or 0))]
    chosen: list[dict[str, Any]] = []
    for place in range(max(map(len, queues))):
        round_of = [queue[place] for queue in queues if place < len(queue)]
        chosen += _evenly(round_of, count=limit - len(chosen))
    return chosen


def _evenly(items: list[dict[str, Any]], *, count: int) -> list[dict[str, Any]]:
    """`count` of the items, the last and then evenly back, or all where there are not so many."""
    if count >= len(items):
        return items
    return [items[len(items) * (n + 1) // count - 1] for n in range(count)]


def _with_repeats(
    firsts: list[Presentation], *, num_repeated: int, rng: random.Random
) -> list[Presentation]:
    """The firsts with repeats put in behind them.

    Repeats are of the first half, which leaves room behind; where more are wanted, all of the
    first half come again behind the last first, and then those of the second half have room too.
    """
    num, half = len(firsts), (len(firsts) + 1) // 2
    gap = max(1, min(FARTHEST_APART, num // 2))
    num_early = min(half, num_repeated)
    repeated = sorted(rng.sample(range(half), num_early))
    repeated += sorted(rng.sample(range(half, num), num_repeated - num_early))
    plan = list(range(num))  # a first by its number, a repeat by the same with its bits inverted
    for first in repeated:
        lowest = plan.index(first) + gap if num_repeated <= half else max(first + gap, num)
        plan.insert(rng.randint(lowest, len(plan)), ~first)
    return [firsts[n] if n >= 0 else replace(firsts[~n], repeat=1) for n in plan]


def _presentation(sample: dict[str, Any], *, repeat: int) -> Presentation:
    return Presentation(sample["sample_id"], sample["prompt"], sample["completion"], repeat)


def _draw(*names: str) -> bytes:
    return hashlib.sha256("\x1f".join(names).encode("utf-8", "surrogatepass")).digest()
