"""From log-likelihoods to answers, and from answers to metrics with standard errors.

The definitions are those of lm-eval 0.4.13: `acc` takes the likeliest choice, `acc_norm` the
likeliest by nats per character, of equals the first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from milepost.evaluation.items import Item, ItemResult


def item_results(
    items: Sequence[Item], loglikelihoods: Sequence[Sequence[float]]
) -> list[ItemResult]:
    """How a model answered each item.

    Args:
        items: in any order.
        loglikelihoods: nats of each choice of each item, in the same order.
    """
    results = []
    for item, nats in zip(items, loglikelihoods, strict=True):
        lengths = [choice.num_characters for choice in item.choices]
        by_character = [_over(value, num) for value, num in zip(nats, lengths, strict=True)]
        results.append(
            ItemResult(
                item_id=item.item_id,
                gold=item.gold,
                loglikelihoods=tuple(nats),
                chosen=_first_best(nats),
                chosen_norm=_first_best(by_character),
                extra={},
            )
        )
    return results


def _over(nats: float, num_characters: int) -> float:
    # A text that is empty once it is cleaned is never the likeliest, as in the harness, where
    # the division by zero gives minus infinity.
    return nats / num_characters if num_characters else -math.inf


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def metric_values(
    results: Sequence[ItemResult], names: Sequence[str]
) -> dict[str, tuple[float, float | None]]:
    """Each metric with its standard error, by name.

    Args:
        results: of one item or more.
        names: "acc", "acc_norm".

    Returns:
        (mean, standard error of the mean from the sample's deviation); of one item the error is
        None.
    """
    hits = {
        "acc": [float(result.chosen == result.gold) for result in results],
        "acc_norm": [float(result.chosen_norm == result.gold) for result in results],
    }
    return {name: _mean_and_error(hits[name]) for name in names}


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, deviation / math.sqrt(count)


def chance(items: Sequence[Item]) -> float:
    """Accuracy of guessing."""
    return sum(1 / len(item.choices) for item in items) / len(items)


def majority(items: Sequence[Item]) -> float:
    """Accuracy of always giving the place among the choices that is most often true."""
    return max(Counter(item.gold for item in items).values()) / len(items)
