"""What the API refuses, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from milepost.core.errors import MilepostError

INVALID = "invalid_request_error"
TOO_MANY = "rate_limit_error"
SERVER = "server_error"

_MOST_SHOWN = 80


class RefusedError(MilepostError):
    """A request that is not answered, with what a client is told.

    Attributes:
        status: of HTTP.
        kind: OpenAI's `type`.
        param: which field of the request is meant; None: no single one.
        code: a word that programs can look at; None where OpenAI has none.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code

    @property
    def content(self) -> dict[str, Any]:
        """The body of the reply."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """What the status wants beside it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def too_long(length: str, *, context: int, num_free: int, where: str, param: str) -> RefusedError:
    """A prompt that does not fit.

    Args:
        length: tokens of the prompt, perhaps as "at least N".
        context: positions of the model.
        num_free: how many of them must stay free for the completion.
        where: which prompt.
        param: the field that holds it.
    """
    room = "" if num_free == 0 else f", of which {num_free} must stay free for the completion"
    return RefusedError(
        f"{where} has {length} tokens; the model's context is {context} tokens{room}",
        param=param,
        code="context_length_exceeded",
    )


def server_is_ending() -> RefusedError:
    """The server was told to stop."""
    return RefusedError("the server is shutting down", status=503, kind=SERVER)


def failed_inside() -> RefusedError:
    """Something that is not the client's doing; the terminal of the server says what."""
    message = "the server failed to answer this request; the terminal it runs in says why"
    return RefusedError(message, status=500, kind=SERVER, code="internal_error")


def shown(value: object) -> str:
    """A short form of what a client sent, safe to send back: half characters are escaped."""
    text = repr(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
