"""The one thread that owns the models: requests wait, take turns step by step, and end.

So many requests are under way at once, so many more wait, others are refused. Those under way
take a step each in turn, so that a short one is not held up by a long one. Nothing here knows
of models or of HTTP.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

from milepost.api.refusals import TOO_MANY, RefusedError, failed_inside, server_is_ending
from milepost.core import console
from milepost.core.errors import MilepostError

Told = TypeVar("Told")

Deliver = Callable[[Told | MilepostError | None], None]
"""Takes what a job tells, in order: results, and at last an error, or None where all went well.

It is called by the worker's thread and by threads that cancel or close, never after the last."""


@dataclass(eq=False)
class Job(Generic[Told]):
    """One request on its way.

    Attributes:
        steps: the work; closed where nobody waits for it any more.
        deliver: who is told.
        is_over: whether the last was delivered.
    """

    steps: Generator[Told, None, None]
    deliver: Deliver[Told]
    is_over: bool = False


class Worker(Generic[Told]):
    """Does the steps of jobs, until it is closed."""

    def __init__(self, *, most_at_once: int, most_waiting: int) -> None:
        """Starts the thread.

        Args:
            most_at_once: jobs under way.
            most_waiting: jobs behind them.
        """
        self._most_at_once = most_at_once
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job[Told]] = deque()
        self._under_way: list[Job[Told]] = []
        self._is_closed = False
        # Its end is not waited for: a step of a large model may take longer than a person waits.
        self._thread = threading.Thread(target=self._work, name="models", daemon=True)
        self._thread.start()

    @property
    def num_jobs(self) -> int:
        """Jobs that have a place, under way or waiting."""
        with self._changed:
            return len(self._waiting) + len(self._under_way)

    def submit(self, steps: Generator[Told, None, None], *, deliver: Deliver[Told]) -> Job[Told]:
        """Gives a job a place.

        Raises:
            RefusedError: no place is free, or the worker is closed.
        """
        with self._changed:
            if self._is_closed:
                raise server_is_ending()
            num_jobs = len(self._waiting) + len(self._under_way)
            if num_jobs >= self._most_at_once + self._most_waiting:
                raise RefusedError(
                    f"{num_jobs} requests are under way or waiting, no more are taken; try again",
                    status=429,
                    kind=TOO_MANY,
                    code="rate_limit_exceeded",
                )
            job = Job(steps, deliver)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job[Told]) -> None:
        """Ends a job that nobody waits for; where it is under way, after its step."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            job.is_over = True

    def close(self) -> None:
        """Ends all jobs with an error, and the thread after the step it is in."""
        with self._changed:
            self._is_closed = True
            jobs = [*self._under_way, *self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for job in jobs:
            self._end(job, server_is_ending())

    def _work(self) -> None:
        while self._take_jobs():
            for job in list(self._under_way):
                if not job.is_over:
                    self._step(job)
                if job.is_over:
                    job.steps.close()
                    with self._changed:
                        self._under_way.remove(job)
        for job in self._under_way:
            job.steps.close()

    def _take_jobs(self) -> bool:
        """Waits until there is something to do; False: never again."""
        with self._changed:
            while not (self._is_closed or self._waiting or self._under_way):
                self._changed.wait()
            while self._waiting and len(self._under_way) < self._most_at_once:
                self._under_way.append(self._waiting.popleft())
            return not self._is_closed

    def _step(self, job: Job[Told]) -> None:
        try:
            told = next(job.steps)
        except StopIteration:
            self._end(job, None)
        except MilepostError as error:
            self._end(job, error)
        except Exception:  # a bug in one request must not take the server from the others
            console.say(traceback.format_exc())
            self._end(job, failed_inside())
        else:
            with self._changed:
                if not job.is_over:
                    job.deliver(told)

    def _end(self, job: Job[Told], error: MilepostError | None) -> None:
        with self._changed:
            if not job.is_over:
                job.is_over = True
                job.deliver(error)
