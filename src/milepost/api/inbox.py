"""What the worker tells of one job, on its way from the worker's thread to the one that replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator

from starlette.requests import Request

from milepost.api.answers import Piece, Told
from milepost.api.worker import Job, Worker
from milepost.core.errors import MilepostError


class ClientGoneError(Exception):
    """Nobody waits for this reply any more."""


class Inbox:
    """What the worker tells of one job; a client that goes away frees the job's place."""

    def __init__(self, worker: Worker[Told]) -> None:
        self._worker = worker
        self._told: asyncio.Queue[Told | Exception | None] = asyncio.Queue()
        self._job: Job[Told] | None = None
        self._watching: asyncio.Task[None] | None = None

    def submit(self, steps: Generator[Told, None, None], *, request: Request) -> None:
        """Gives the job to the worker.

        Raises:
            RefusedError: no place is free.
        """
        loop = asyncio.get_running_loop()

        def deliver(told: Told | MilepostError | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._told.put_nowait, told)

        self._job = self._worker.submit(steps, deliver=deliver)
        self._watching = asyncio.create_task(self._watch(request))

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._told.put_nowait(ClientGoneError())
        # Here and not by whoever takes it: a stream that was never begun takes nothing.
        self._cancel()

    async def next(self) -> Told | None:
        """The next that is told; None where all was.

        Raises:
            MilepostError: the job failed.
            ClientGoneError: the client went away.
        """
        told = await self._told.get()
        if told is None or isinstance(told, Exception):
            self.close()
        if isinstance(told, Exception):
            raise told
        return told

    async def pieces(self) -> AsyncIterator[Piece]:
        """All that follows."""
        while (told := await self.next()) is not None:
            assert isinstance(told, Piece), "an answer is opened once"
            yield told

    def close(self) -> None:
        """Ends the job if it is not over."""
        self._cancel()
        if self._watching is not None:
            self._watching.cancel()

    def _cancel(self) -> None:
        if self._job is not None:
            self._worker.cancel(self._job)
