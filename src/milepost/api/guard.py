"""Who may ask: with a key whoever has it, without one programs of this machine."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from milepost.api.refusals import RefusedError
from milepost.serve.local import foreign_request


class Guard:
    """Stands before the application."""

    def __init__(self, app: ASGIApp, *, key: str | None) -> None:
        """Wraps an application.

        Args:
            app: what is guarded.
            key: which every request must bring; None: none is needed, and then neither another
                machine nor a page of another site in a browser of this one may ask.
        """
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a refusal, or hands the request on."""
        if scope["type"] != "http":
            return
        refusal = self._refusal(Headers(scope=scope), method=scope["method"])
        if refusal is None:
            await self._app(scope, receive, send)
            return
        response = JSONResponse(refusal.content, refusal.status, headers=refusal.headers)
        await response(scope, receive, send)

    def _refusal(self, headers: Headers, *, method: str) -> RefusedError | None:
        if self._key is None:
            foreign = foreign_request(headers, method=method)
            return None if foreign is None else RefusedError(foreign[1], status=foreign[0])
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Compared in a time that says nothing of how much of it is right.
        is_right = hmac.compare_digest(given.strip().encode(), self._key.encode())
        if kind.lower() == "bearer" and is_right:
            return None
        what = "the key is not the one of this server" if given else "this server needs a key"
        message = f"{what}: send it as Authorization: Bearer KEY"
        return RefusedError(message, status=401, code="invalid_api_key")
