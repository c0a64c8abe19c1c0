"""Batches read one ahead, and what becomes of a read that does not come back."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from milepost.core.errors import DataError
from milepost.data.batch import Batch
from milepost.data.read_ahead import ReadAhead


class Numbered:
    """The batch of a step holds its number; some cannot be read, one waits until it is let go."""

    def __init__(self, *, broken: int | None = None, held: int | None = None) -> None:
        self.read: list[int] = []
        self.is_closed = False
        self.let_go = threading.Event()
        self._broken = broken
        self._held = held

    def batch(self, data_step: int) -> Batch:
        self.read.append(data_step)
        if data_step == self._held:
            assert self.let_go.wait(30)
        if data_step == self._broken:
            raise DataError("a shard went away")
        return Batch.of_tokens(np.full((2, 3), data_step, dtype=np.uint32))

    def close(self) -> None:
        self.is_closed = True


def number(batch: Batch) -> int:
    return int(batch.inputs[0, 0])


def test_any_order_gives_the_batch_of_the_step_that_is_asked_for() -> None:
    source, before = Numbered(), set(threading.enumerate())
    ahead = ReadAhead(source, timeout_seconds=30)
    order = [0, 1, 2, 7, 8, 3, 3, 4]
    assert [number(ahead.batch(step)) for step in order] == order
    ahead.close()
    assert source.is_closed
    assert set(threading.enumerate()) <= before, "no thread is left"


def test_the_next_batch_is_read_before_it_is_asked_for() -> None:
    source = Numbered(held=5)
    ahead = ReadAhead(source, timeout_seconds=30)
    assert number(ahead.batch(4)) == 4
    source.let_go.set()
    assert number(ahead.batch(5)) == 5
    ahead.close()
    assert source.read == [4, 5, 6], "each once"


def test_a_batch_that_cannot_be_read_is_told_where_it_is_asked_for_and_no_earlier() -> None:
    ahead = ReadAhead(Numbered(broken=3), timeout_seconds=30)
    assert number(ahead.batch(2)) == 2
    with pytest.raises(DataError, match="a shard went away"):
        ahead.batch(3)
    assert number(ahead.batch(4)) == 4
    ahead.close()


def test_a_read_that_hangs_is_told_of_and_given_up_with_where_it_stands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Numbered(held=1)
    told: list[tuple[int, float]] = []
    marks: list[str] = []
    ahead = ReadAhead(
        source,
        timeout_seconds=0.2,
        slow=lambda data_step, seconds: told.append((data_step, seconds)),
        stalled=lambda: marks.append("stalled"),
    )
    assert number(ahead.batch(0)) == 0
    with pytest.raises(DataError, match=r"the batch of data step 1 was not read in 0\.2 s"):
        ahead.batch(1)
    assert [step for step, _ in told] == [1] and told[0][1] >= 0.1
    assert marks == ["stalled"]
    assert "the thread that reads the data stands here:" in capsys.readouterr().err
    ahead.close()
    assert not source.is_closed, "nothing is taken away from a read that hangs"
    source.let_go.set()
