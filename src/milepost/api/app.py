"""The API as a web application: requests in, replies or streams out, errors in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from milepost.api.answers import Opened, Told, answer
from milepost.api.catalog import Catalog, NamedModel
from milepost.api.guard import Guard
from milepost.api.inbox import ClientGoneError, Inbox
from milepost.api.library import Library
from milepost.api.refusals import SERVER, RefusedError, failed_inside
from milepost.api.replies import ChatReply, CompletionReply
from milepost.api.requests import Request as Asked
from milepost.api.requests import chat_request, completion_request
from milepost.api.worker import Worker
from milepost.core import console
from milepost.core.errors import DivergedError, MilepostError

MOST_BODY_BYTES = 4 << 20


@dataclass
class Tally:
    """What was answered so far."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Server:
    """What answers.

    Attributes:
        catalog: the models by name.
        library: the models in memory.
        worker: who works.
        most_tokens: of a completion; None: what the context takes.
        tally: what was answered.
        clock: seconds since 1970.
        draw: a random number of 63 bits: seeds and names of replies.
    """

    catalog: Catalog
    library: Library
    worker: Worker[Told]
    most_tokens: int | None
    tally: Tally
    clock: Callable[[], float]
    draw: Callable[[], int]


def build_app(server: Server, *, key: str | None) -> FastAPI:
    """The application.

    Args:
        server: what answers.
        key: see `Guard`.
    """
    app = FastAPI(title="Milepost", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, key=key)
    _add_error_replies(app)

    @app.get("/v1/models")
    async def models() -> Response:
        found = [_model(model) for model in server.catalog.models()]
        return _json({"object": "list", "data": found})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        known = {model.name: model for model in server.catalog.models()}
        return _json(_model(known.get(name) or server.catalog.find(name)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = completion_request(await _body(request), most_tokens=server.most_tokens)
        return await _respond(request, asked, form=CompletionReply, server=server)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = chat_request(await _body(request), most_tokens=server.most_tokens)
        return await _respond(request, asked, form=ChatReply, server=server)

    return app


def _model(model: NamedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "milepost",
    }


async def _body(request: Request) -> bytes:
    """The body, as far as it is not too long.

    Raises:
        RefusedError: it is.
    """
    parts, length = [], 0
    async for part in request.stream():
        parts.append(part)
        length += len(part)
        if length > MOST_BODY_BYTES:
            raise RefusedError(f"the body is longer than {MOST_BODY_BYTES} bytes", status=413)
    return b"".join(parts)


async def _respond(
    request: Request, asked: Asked, *, form: type[CompletionReply], server: Server
) -> Response:
    wanted = server.catalog.find(asked.model)
    reply = form(
        reply_id=f"{server.draw():016x}",
        created=int(server.clock()),
        num_choices=max(1, len(asked.prompts)) * asked.num_choices,
        num_likeliest=asked.num_likeliest,
    )
    steps = answer(asked, wanted=wanted, library=server.library, fresh_seed=server.draw())
    inbox = Inbox(server.worker)
    inbox.submit(steps, request=request)
    with ExitStack() as closing:
        closing.callback(inbox.close)
        opened = await inbox.next()
        assert isinstance(opened, Opened), "the first that an answer tells"
        reply.open(opened)
        server.tally.requests += 1
        server.tally.prompt_tokens += opened.prompt_tokens
        if asked.is_streamed:
            closing.pop_all()  # the stream closes it
            events = _events(inbox, reply, has_usage=asked.has_usage, tally=server.tally)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        async for piece in inbox.pieces():
            reply.add(piece)
            server.tally.completion_tokens += piece.num_tokens
    return _json(reply.whole())


async def _events(
    inbox: Inbox, reply: CompletionReply, *, has_usage: bool, tally: Tally
) -> AsyncIterator[bytes]:
    """The stream: chunks, perhaps the counts, and its end; or an error in place of the rest."""
    try:
        for chunk in reply.first_chunks():
            yield _event(chunk)
        async for piece in inbox.pieces():
            reply.add(piece)
            tally.completion_tokens += piece.num_tokens
            if piece.text or piece.tokens or piece.finish_reason:
                yield _event(reply.chunk(piece))
        if has_usage:
            yield _event(reply.usage_chunk())
        yield b"data: [DONE]\n\n"
    except ClientGoneError:
        return
    except MilepostError as error:
        yield _event(_as_refusal(error).content)
    finally:
        inbox.close()


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + _encoded(content) + b"\n\n"


def _json(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(_encoded(content), status, headers, media_type="application/json")


def _encoded(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _as_refusal(error: MilepostError) -> RefusedError:
    """What a client is told; what names folders is for the terminal only."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, DivergedError):
        return RefusedError(error.message, status=500, kind=SERVER)
    console.say_error(error)
    return failed_inside()


def _add_error_replies(app: FastAPI) -> None:
    @app.exception_handler(MilepostError)
    async def known(request: Request, error: MilepostError) -> Response:
        refusal = _as_refusal(error)
        return _json(refusal.content, refusal.status, refusal.headers)

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        told = {
            404: f"there is nothing at {request.url.path[:200]}; the API begins with /v1",
            405: f"{request.method[:20]} is not answered at {request.url.path[:200]}",
        }
        message = told.get(error.status_code, str(error.detail))
        return _json(RefusedError(message).content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return _json(failed_inside().content, 500)
