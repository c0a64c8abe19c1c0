"""From log-likelihoods to answers and metrics."""

from __future__ import annotations

import statistics

import pytest

from milepost.evaluation.items import Choice, Item, ItemResult
from milepost.evaluation.metrics import chance, item_results, majority, metric_values


def item(*num_characters: int, gold: int = 0) -> Item:
    return Item("one", gold, tuple(Choice((1,), (2,), num) for num in num_characters))


def answer(item: Item, *nats: float) -> ItemResult:
    (result,) = item_results([item], [list(nats)])
    return result


@pytest.mark.parametrize(
    ("lengths", "nats", "chosen", "chosen_norm"),
    [
        ((2, 2), (-3.0, -2.0), 1, 1),
        ((2, 8), (-3.0, -4.0), 0, 1),  # -1.5 and -0.5 nats a character
        ((2, 2, 2), (-3.0, -3.0, -3.0), 0, 0),  # of equals the first
        ((2, 4, 2), (-3.0, -2.0, -1.0), 2, 1),
        ((0, 4), (-1.0, -9.0), 0, 1),  # a choice without characters is never the likeliest
        ((0, 0), (-2.0, -1.0), 1, 0),
        ((3, 3), (0.0, -0.0), 0, 0),
    ],
)
def test_the_likeliest_is_chosen_by_sum_and_by_character(
    lengths: tuple[int, ...], nats: tuple[float, ...], chosen: int, chosen_norm: int
) -> None:
    result = answer(item(*lengths), *nats)
    assert (result.chosen, result.chosen_norm) == (chosen, chosen_norm)
    assert result.loglikelihoods == nats


def test_metrics_are_means_with_the_samples_standard_error() -> None:
    lengths, nats = (2, 8), [-3.0, -4.0]
    golds = [0, 0, 1, 0, 1]
    items = [item(*lengths, gold=gold) for gold in golds]
    values = metric_values(item_results(items, [nats] * 5), ("acc", "acc_norm"))
    assert list(values) == ["acc", "acc_norm"]
    for name, hits in (("acc", [1.0, 1, 0, 1, 0]), ("acc_norm", [0.0, 0, 1, 0, 1])):
        assert values[name][0] == statistics.mean(hits)
        assert values[name][1] == pytest.approx(statistics.stdev(hits) / 5**0.5, rel=1e-12)


def test_one_item_has_no_standard_error() -> None:
    results = [answer(item(1, 1), -1.0, -2.0)]
    assert metric_values(results, ("acc",)) == {"acc": (1.0, None)}


def test_chance_and_majority_are_of_the_items() -> None:
    items = [item(1, 1, gold=1), item(1, 1, 1, 1, gold=1), item(1, 1, 1, 1, gold=3)]
    assert chance(items) == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert majority(items) == pytest.approx(2 / 3)
