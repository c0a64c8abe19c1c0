"""`milepost serve`: an OpenAI-compatible API to the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from milepost.core import console
from milepost.core.errors import UsageError

if TYPE_CHECKING:
    import socket

    from milepost.api.app import Tally
    from milepost.api.catalog import Catalog
    from milepost.api.library import ServedModel

FIRST_PORT = 8757


def serve(
    model: Path,
    *,
    adapter: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key_env: str | None = None,
    concurrency: int = 4,
    queue: int = 32,
    max_tokens: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Serve a model, or all checkpoints of a run, to programs that speak OpenAI's API.

    Answers /v1/models, /v1/completions and /v1/chat/completions, whole or streamed. RUN is the
    name of the latest checkpoint of a run, RUN:STEP that of any. Only programs of this machine
    are answered; for any other address a key is needed. Ctrl-C ends it.

    Example: `milepost serve runs/demo --port 8757`

    Parameters
    ----------
    model
        A run folder, a checkpoint folder, an adapter, or any Hugging Face LLaMA folder.
    adapter
        A fine-tuning run or a folder in PEFT's format, whose adapter is put on the model. What is
        served has its name.
    host
        The address to listen at. Others than this machine's own need --api-key-env.
    port
        Port of the API; 0 takes any free one. Default: 8757, or the next that is free.
    api_key_env
        Name of the environment variable that holds the key which every request must bring.
    concurrency
        Requests that are answered at once, a token each in turn.
    queue
        Requests that wait behind them; more are refused with status 429.
    max_tokens
        Most tokens of a completion. Default: as many as the model's context takes.
    dtype
        Of the forward pass. Default: that of each model's file.
    json
        When the server has ended, one JSON document on stdout: what was answered.
    """
    for name, value, least in (("concurrency", concurrency, 1), ("queue", queue, 0)):
        if value < least:
            raise UsageError(f"--{name} is {value}", hint=f"give {least} or more")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}", hint="give 1 or more")
    key = _key(api_key_env, host=host)
    from milepost.serve.local import listen_at

    with listen_at(host, port=port, first_port=FIRST_PORT) as listening:
        tally = _serve(
            model, adapter=adapter, listening=listening, key=key, concurrency=concurrency,
            queue=queue, max_tokens=max_tokens, dtype=dtype,
        )  # fmt: skip
    requests = "1 request was" if tally.requests == 1 else f"{tally.requests} requests were"
    console.say(
        f"ended; {requests} answered: {tally.prompt_tokens} tokens of prompts,"
        f" {tally.completion_tokens} of completions"
    )
    if json:
        console.show_json({"model": model, "answered": vars(tally)})


def _key(name: str | None, *, host: str) -> str | None:
    """The key in the variable of that name.

    Raises:
        UsageError: a key is needed and there is none, or it is too easy to guess.
    """
    import os

    from milepost.serve.local import is_loopback

    if name is None:
        if is_loopback(host):
            return None
        raise UsageError(
            f"--host {host} can be reached from other machines, and no key is asked for",
            hint="name the variable that holds one with --api-key-env, or leave --host out",
        )
    key = os.environ.get(name, "")
    if not key:
        raise UsageError(f"the environment variable {name} is not set", hint=_MAKE_KEY.format(name))
    if len(key) < FEWEST_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"the key in {name} has to be {FEWEST_KEY_CHARACTERS} or more plain characters "
            "without spaces",
            hint=_MAKE_KEY.format(name),
        )
    return key


FEWEST_KEY_CHARACTERS = 16
_MAKE_KEY = 'export {}=$(python3 -c "import secrets; print(secrets.token_urlsafe(24))") makes one'


def _serve(
    path: Path,
    *,
    adapter: Path | None,
    listening: socket.socket,
    key: str | None,
    concurrency: int,
    queue: int,
    max_tokens: int | None,
    dtype: str,
) -> Tally:
    """Answers until the end is asked for; returns what was answered."""
    import secrets
    import time

    import torch

    from milepost.api.answers import Told
    from milepost.api.app import Server, Tally, build_app
    from milepost.api.catalog import Catalog
    from milepost.api.library import Library
    from milepost.api.worker import Worker
    from milepost.serve.local import address_of, serve_until_stopped

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    catalog = Catalog(path, adapter=adapter)
    library = Library(dtype=dtype, device=device)
    served = library.open(catalog.latest)
    worker: Worker[Told] = Worker(most_at_once=concurrency, most_waiting=queue)
    server = Server(
        catalog=catalog,
        library=library,
        worker=worker,
        most_tokens=max_tokens,
        tally=Tally(),
        clock=time.time,
        draw=lambda: secrets.randbits(63),
    )
    address = address_of(listening)
    console.say(f"API: {address}v1")
    for line in _what_is_served(served, catalog=catalog, device=str(device)):
        console.say(line)
    if key is not None:
        console.say(
            "every request needs the key, which travels unencrypted: use it where that is fine"
        )
    console.say("Ctrl-C ends it")
    serve_until_stopped(
        build_app(server, key=key),
        listening=listening,
        closing_seconds=CLOSING_SECONDS,
        before_closing=worker.close,
    )
    return server.tally


CLOSING_SECONDS = 1
"""For the last words of streams; their work has ended by then."""


def _what_is_served(served: ServedModel, *, catalog: Catalog, device: str) -> list[str]:
    from milepost.core.units import format_count

    num_parameters = sum(parameter.numel() for parameter in served.decoder.model.parameters())
    dtype = str(served.decoder.compute_dtype).removeprefix("torch.")
    lines = [
        f"model: {catalog.name}",
        f"       {format_count(num_parameters)} parameters, a context of {served.context} tokens,"
        f" {dtype} on {device}",
    ]
    names = [model.name for model in catalog.models() if model.name != catalog.name]
    if names:
        lines[0] += f", now {served.name}"
    if len(names) > 1:
        lines.append(f"       and {len(names)} checkpoints by name, {names[0]} to {names[-1]}")
    if served.template is None:
        lines.append("       its files hold no chat template: chats are put to it in Vicuna 1.1's")
    return lines
