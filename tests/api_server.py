"""The API on a free port of this machine, in a thread, as `milepost serve` builds it."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn

from milepost.api.answers import Told
from milepost.api.app import Server, Tally, build_app
from milepost.api.catalog import Catalog
from milepost.api.library import Library
from milepost.api.worker import Worker
from milepost.serve.local import listen_at

CREATED = 1767603600


class ApiServer:
    """Answers while the block lasts.

    Attributes:
        worker: who works.
        base_url: what clients take.
    """

    def __init__(
        self,
        model: Path,
        *,
        key: str | None = None,
        most_at_once: int = 2,
        most_waiting: int = 2,
        most_tokens: int | None = None,
    ) -> None:
        numbers = itertools.count(1)
        self.worker: Worker[Told] = Worker(most_at_once=most_at_once, most_waiting=most_waiting)
        self.server = Server(
            catalog=Catalog(model),
            library=Library(dtype="auto", device=torch.device("cpu")),
            worker=self.worker,
            most_tokens=most_tokens,
            tally=Tally(),
            clock=lambda: CREATED,
            draw=lambda: next(numbers),
        )
        self.app = build_app(self.server, key=key)
        self._listening = listen_at("127.0.0.1", port=0, first_port=0)
        self.port = self._listening.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ApiServer:
        config = uvicorn.Config(
            self.app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=5
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._uvicorn.run, kwargs={"sockets": [self._listening]}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._uvicorn.should_exit = True
        self.worker.close()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def client(self, *, key: str = "none") -> openai.OpenAI:
        """OpenAI's own client, which here tries nothing twice."""
        return openai.OpenAI(base_url=self.base_url, api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """A request with any bytes, or JSON of anything, as its body."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        return httpx.post(self.base_url + path, content=content, headers=kind | headers, timeout=60)
