"""The order of rows: a permutation an epoch, the same however it is asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.data.order import row_ids


def order(*, num_rows: int, count: int, seed: int = 1, fingerprint: str = "f") -> np.ndarray:
    return row_ids(
        fingerprint=fingerprint, seed=seed, data_step=0, rows_per_step=count, num_rows=num_rows
    )


@given(num_rows=st.integers(1, 3000), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_each_epoch_has_every_row_once(num_rows: int, seed: int) -> None:
    rows = order(num_rows=num_rows, count=2 * num_rows, seed=seed)
    assert rows.dtype == np.int64
    assert sorted(rows[:num_rows]) == list(range(num_rows))
    assert sorted(rows[num_rows:]) == list(range(num_rows))


@given(num_rows=st.integers(1, 500), batch=st.integers(1, 60), step=st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_the_order_does_not_depend_on_how_it_is_asked_for(
    num_rows: int, batch: int, step: int
) -> None:
    def ask(data_step: int, rows_per_step: int) -> list[int]:
        return row_ids(
            fingerprint="f",
            seed=7,
            data_step=data_step,
            rows_per_step=rows_per_step,
            num_rows=num_rows,
        ).tolist()

    one_by_one = [ask(step * batch + place, 1)[0] for place in range(batch)]
    assert ask(step, batch) == one_by_one


def test_seed_fingerprint_and_epoch_change_the_order() -> None:
    first = order(num_rows=1000, count=1000)
    others = [
        order(num_rows=1000, count=1000, seed=2),
        order(num_rows=1000, count=1000, fingerprint="g"),
        order(num_rows=1000, count=2000)[1000:],
        np.arange(1000),
    ]
    for other in others:
        assert np.mean(first == other) < 0.02


def test_rows_are_spread_evenly() -> None:
    """A chi-squared of places by tenths; 99 degrees of freedom, 0.999 quantile 148.2."""
    num_rows = 100_003
    rows = order(num_rows=num_rows, count=num_rows)
    places = np.arange(num_rows) * 10 // num_rows
    counts, *_ = np.histogram2d(places, rows * 10 // num_rows, bins=(10, 10))
    expected = num_rows / 100
    assert ((counts - expected) ** 2 / expected).sum() < 148.2
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02


def test_ten_thousand_million_rows_cost_no_table() -> None:
    num_rows = 10**10
    rows = row_ids(fingerprint="f", seed=1, data_step=10**6, rows_per_step=4096, num_rows=num_rows)
    assert len(set(rows.tolist())) == 4096
    assert rows.min() >= 0 and num_rows * 0.99 < rows.max() < num_rows


def test_the_order_is_the_one_that_runs_were_trained_on() -> None:
    """Pinned: a change here would break the exact resume of every run that exists."""
    assert order(num_rows=10, count=10).tolist() == [7, 0, 6, 9, 8, 2, 3, 5, 4, 1]
    rows = row_ids(fingerprint="f", seed=1, data_step=10**6, rows_per_step=3, num_rows=10**10)
    assert rows.tolist() == [1434170248, 8268165645, 141606494]
