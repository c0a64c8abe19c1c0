"""The worker behind the API: places, turns, ends."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from milepost.api.inbox import ClientGoneError, Inbox
from milepost.api.refusals import RefusedError
from milepost.api.worker import Worker
from milepost.core.errors import DivergedError, MilepostError

WAIT_SECONDS = 30


@pytest.fixture
def worker() -> Iterator[Worker[Any]]:
    made: Worker[Any] = Worker(most_at_once=2, most_waiting=1)
    yield made
    made.close()


class Gate:
    """A job that tells its steps one at a time, as it is let."""

    def __init__(
        self, worker: Worker[Any], *, steps: int = 3, log: list[str] | None = None
    ) -> None:
        self.told: queue.Queue[Any] = queue.Queue()
        self.let = threading.Semaphore(0)
        self.closed = threading.Event()
        self.job = worker.submit(self._steps(steps), deliver=self.told.put)

    def _steps(self, count: int) -> Generator[int, None, None]:
        try:
            for number in range(count):
                assert self.let.acquire(timeout=WAIT_SECONDS)
                yield number
        finally:
            self.closed.set()

    def open(self, count: int = 100) -> None:
        self.let.release(count)

    def all(self) -> list[Any]:
        """Everything told, to the end."""
        found = []
        while (told := self.told.get(timeout=WAIT_SECONDS)) is not None:
            found.append(told)
            if isinstance(told, Exception):
                break
        return found


def test_a_job_tells_its_steps_in_order_and_then_that_it_is_over(worker) -> None:
    gate = Gate(worker)
    gate.open()
    assert gate.all() == [0, 1, 2]
    assert gate.closed.wait(WAIT_SECONDS)


def test_jobs_under_way_take_turns(worker) -> None:
    order: list[tuple[str, int]] = []
    both_in = threading.Event()

    def steps(name: str) -> Generator[int, None, None]:
        assert both_in.wait(WAIT_SECONDS)
        for number in range(3):
            order.append((name, number))
            yield number

    ends: queue.Queue[Any] = queue.Queue()
    for name in "ab":
        worker.submit(steps(name), deliver=lambda told: ends.put(told) if told is None else None)
    both_in.set()
    for _ in "ab":
        assert ends.get(timeout=WAIT_SECONDS) is None
    # The first may be a step ahead: the second came while it waited.
    assert [number for _, number in order] in ([0, 0, 1, 1, 2, 2], [0, 1, 0, 2, 1, 2])


def test_one_more_than_there_are_places_is_refused_until_one_is_over(worker) -> None:
    gates = [Gate(worker) for _ in range(3)]
    with pytest.raises(RefusedError) as caught:
        Gate(worker)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert "Retry-After" in caught.value.headers
    for gate in gates:
        gate.open()
    for gate in gates:
        assert gate.all() == [0, 1, 2]
        assert gate.closed.wait(WAIT_SECONDS)
    after = Gate(worker)
    after.open()
    assert after.all() == [0, 1, 2]


def test_a_waiting_job_that_is_cancelled_leaves_its_place_at_once(worker) -> None:
    gates = [Gate(worker) for _ in range(3)]
    worker.cancel(gates[2].job)
    late = Gate(worker)  # takes the place
    going = (*gates[:2], late)
    for gate in going:
        gate.open()
    for gate in going:
        assert gate.all() == [0, 1, 2]
    assert gates[2].told.empty()


def test_a_job_under_way_that_is_cancelled_is_closed_after_its_step(worker) -> None:
    gate = Gate(worker, steps=1000)
    gate.open(1)
    assert gate.told.get(timeout=WAIT_SECONDS) == 0
    worker.cancel(gate.job)
    gate.open(1)
    assert gate.closed.wait(WAIT_SECONDS)
    assert gate.told.empty()
    other = Gate(worker)
    other.open()
    assert other.all() == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "told", "status"),
    [
        (DivergedError("not finite"), "not finite", None),
        (RefusedError("too long"), "too long", 400),
        (ZeroDivisionError("a bug"), "the server failed to answer this request", 500),
    ],
)
def test_a_job_that_fails_tells_it_and_the_worker_goes_on(
    worker, capsys, error: Exception, told: str, status: int | None
) -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise error

    seen: queue.Queue[Any] = queue.Queue()
    worker.submit(failing(), deliver=seen.put)
    assert seen.get(timeout=WAIT_SECONDS) == 1
    failure = seen.get(timeout=WAIT_SECONDS)
    assert isinstance(failure, MilepostError) and failure.message.startswith(told)
    assert getattr(failure, "status", None) == status
    assert ("ZeroDivisionError: a bug" in capsys.readouterr().err) == (status == 500)
    after = Gate(worker)
    after.open()
    assert after.all() == [0, 1, 2]


def test_closing_ends_every_job_and_takes_no_more(worker) -> None:
    gates = [Gate(worker) for _ in range(3)]
    worker.close()
    for gate in gates:
        gate.open(1)
        (failure,) = gate.all()
        assert isinstance(failure, RefusedError) and failure.status == 503
    with pytest.raises(RefusedError, match="shutting down"):
        Gate(worker)


class GoneRequest:
    """A request whose client goes away when the answer has begun."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    async def receive(self) -> dict[str, str]:
        assert await asyncio.to_thread(self.begun.wait, WAIT_SECONDS)
        return {"type": "http.disconnect"}


def test_a_client_that_goes_before_its_reply_is_begun_frees_its_place(worker) -> None:
    request, closed = GoneRequest(), threading.Event()

    def steps() -> Generator[Any, None, None]:
        try:
            while True:
                request.begun.set()
                yield "told to nobody"
        finally:
            closed.set()

    async def ask() -> None:
        inbox = Inbox(worker)
        inbox.submit(steps(), request=request)  # type: ignore[arg-type]
        assert await asyncio.to_thread(closed.wait, WAIT_SECONDS)
        with pytest.raises(ClientGoneError):
            while True:
                await inbox.next()

    asyncio.run(ask())
