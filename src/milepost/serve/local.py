"""Serving a page to this machine alone: who may ask, on which port, until Ctrl-C."""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers

from milepost.core.errors import UsageError

FIRST_PORT = 8737
NUM_PORTS_TRIED = 20
MOST_BODY_BYTES = 16 << 10
CLOSING_SECONDS = 2
"""For answers under way when the end is asked for."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


_READING = ("GET", "HEAD")


def keep_local(app: FastAPI) -> None:
    """Refuses what a page of another site could send here, and bodies that are too large.

    The Host header must name this machine (a foreign name that was made to lead here does not),
    what writes must come from the page itself, and every answer forbids foreign content.
    """

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = _refusal(request)
        response = await answer(request) if refusal is None else refusal
        response.headers.update(HEADERS)
        return response


def _refusal(request: Request) -> Response | None:
    foreign = foreign_request(request.headers, method=request.method)
    if foreign is not None:
        return _refuse(*foreign)
    if request.method in _READING:
        return None
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        return _refuse(411, "the length of the body is not given")
    if len(length) > 9 or int(length) > MOST_BODY_BYTES:
        return _refuse(413, f"the body is longer than {MOST_BODY_BYTES} bytes")
    return None


def foreign_request(headers: Headers, *, method: str) -> tuple[int, str] | None:
    """Status and message for what is not of this machine, or what a page of another site sends.

    Args:
        headers: of the request.
        method: of the request; what only reads may come from anywhere on this machine.
    """
    host = headers.get("host", "")
    if not _is_here(host):
        return 421, f"this address is for this machine only, not for {host[:80]!r}"
    if method in _READING:
        return None
    origin = headers.get("origin")
    if origin is not None and origin.removeprefix("http://") != host:
        return 403, f"a page of {origin[:80]!r} may not write here"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return 403, "a page of another site may not write here"
    return None


def _refuse(status: int, message: str) -> Response:
    hint = "open the address that milepost printed"
    return JSONResponse({"error": message, "hint": hint}, status_code=status)


def _is_here(host: str) -> bool:
    """Whether a Host header names this machine; its port may be that of a tunnel."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, out of reach for others."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_port(host: str, *, port: int | None) -> socket.socket:
    """A socket that listens.

    Args:
        host: an address of this machine, or localhost.
        port: 0: any free one; None: the usual one, or the next one that is free.

    Raises:
        UsageError: the host is reachable from elsewhere, or the port cannot be had.
    """
    if not is_loopback(host):
        raise UsageError(
            f"--host {host}: the page is served to this machine only, it asks for no password",
            hint=f"from elsewhere go through ssh -L {port or FIRST_PORT}:127.0.0.1:"
            f"{port or FIRST_PORT} USER@MACHINE and open http://127.0.0.1:{port or FIRST_PORT}/",
        )
    return listen_at(host, port=port, first_port=FIRST_PORT)


def listen_at(host: str, *, port: int | None, first_port: int) -> socket.socket:
    """A socket that listens, at any address of this machine.

    Args:
        host: an address, or localhost.
        port: 0: any free one; None: `first_port`, or the next one that is free.
        first_port: the usual one.

    Raises:
        UsageError: the port cannot be had.
    """
    if port is not None:
        return _bound(host, port)
    for candidate in range(first_port, first_port + NUM_PORTS_TRIED):
        try:
            return _bound(host, candidate)
        except PortTakenError:
            continue
    return _bound(host, 0)


class PortTakenError(UsageError):
    """Another program listens there."""


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # So that the port can be had again at once after an end.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.EADDRINUSE:
            raise PortTakenError(
                f"port {port} is in use by another program",
                hint="give another --port, or none: then a free one is taken",
            ) from error
        reason = os.strerror(number).lower() if number else "it is not 0 to 65535"
        raise UsageError(
            f"port {port} of {host} cannot be had: {reason}",
            hint="give a --port from 1024 to 65535, or none",
        ) from error
    return listening


def address_of(listening: socket.socket) -> str:
    """The address of the page, as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve_until_stopped(
    app: FastAPI,
    *,
    listening: socket.socket,
    closing_seconds: int = CLOSING_SECONDS,
    before_closing: Callable[[], None] | None = None,
) -> None:
    """Answers until SIGINT (Ctrl-C) or SIGTERM; the main thread calls this.

    Args:
        app: what answers.
        listening: where.
        closing_seconds: for answers under way when the end is asked for.
        before_closing: called once, when the end is asked for.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if before_closing is not None:
                before_closing()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=closing_seconds,
    )
    # The server gives a signal that ended it to whoever would have had it: both end here.
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    for which in before:
        signal.signal(which, signal.default_int_handler)
    try:
        Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
        listening.close()
