"""Asks a model behind an OpenAI-compatible endpoint, through OpenAI's own client.

The client waits and tries again where a server is busy or away (408, 409, 429, 5xx, no connection),
as long as `Retry-After` says. What remains is turned into messages for people here.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from milepost.core.errors import MilepostError
from milepost.evaluation.judge_prompt import reply_schema
from milepost.evaluation.judge_replies import TEMPERATURE, Question, Reply

if TYPE_CHECKING:
    import openai

NUM_RETRIES = 5
REACH_SECONDS = 10.0
_LONGEST_SAID = 300
_MOST_MODELS_SAID = 8

FORMS = ("json_schema", "json_object", "text")
"""How the reply's form is demanded, the strictest first; a server may refuse all but the last."""


class RefusedError(Exception):
    """The server refuses this one question; others may be answered."""


class ChatServer:
    """One server with one model."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str,
        timeout_seconds: float,
        max_reply_tokens: int,
        now: Callable[[], str],
    ) -> None:
        """Makes the client; nothing is sent yet.

        Args:
            base_url: up to and without `/chat/completions`.
            api_key: sent with every request.
            timeout_seconds: of one request.
            max_reply_tokens: where the server cuts a reply off.
            now: the time in UTC, ISO 8601.

        Raises:
            MilepostError: the client is not installed.
        """
        try:
            import openai
        except ImportError as missing:
            raise MilepostError(
                "milepost judge needs OpenAI's client, which is not installed",
                hint='pip install "milepost[judge]"',
            ) from missing
        self.base_url = base_url
        self.form: str | None = None
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, timeout=timeout_seconds, max_retries=NUM_RETRIES
        )
        self._timeout_seconds = timeout_seconds
        self._max_reply_tokens = max_reply_tokens
        self._now = now
        self._settling = asyncio.Lock()
        self._models: list[str] = []

    async def reach(self) -> None:
        """Knocks once, so that a wrong address is told at once and not after all retries.

        Raises:
            MilepostError: nobody is there.
        """
        client = self._client.with_options(max_retries=0, timeout=REACH_SECONDS)
        try:
            models = await client.models.list()
            self._models = [model.id for model in models.data]
        except self._openai.APITimeoutError:
            return  # there, and busy
        except self._openai.APIConnectionError as error:
            raise self._away(error) from error
        except (self._openai.OpenAIError, ValueError, AttributeError, TypeError):
            return  # there, and without a list of its models

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def ask(self, question: Question) -> Reply:
        """Sends one question.

        Raises:
            RefusedError: the server refuses this question, as one that is too long.
            MilepostError: the server refuses them all, is away or stays busy.
        """
        if self.form is not None:
            return await self._ask_in_form(question, self.form)
        async with self._settling:
            if self.form is None:
                return await self._settle(question)
        return await self._ask_in_form(question, self.form)

    def largest_request(self, question: Question) -> tuple[int, int]:
        """Most tokens that a question and its reply can have: a token has at least one byte."""
        sent = json.dumps(
            [list(question.messages), _response_format(question, FORMS[0])], ensure_ascii=False
        )
        return len(sent.encode("utf-8", "surrogatepass")), self._max_reply_tokens

    async def _settle(self, question: Question) -> Reply:
        """Finds the strictest form that the server takes."""
        refused: RefusedError | None = None
        for form in FORMS:
            try:
                reply = await self._ask_in_form(question, form)
            except RefusedError as error:
                refused = error
            else:
                self.form = form
                return reply
        assert refused is not None
        raise refused

    async def _ask_in_form(self, question: Question, form: str) -> Reply:
        openai = self._openai
        started = time.monotonic()
        request: dict[str, Any] = {"max_tokens": self._max_reply_tokens} | _response_format(
            question, form
        )
        try:
            raw = await self._client.chat.completions.with_raw_response.create(
                model=question.model,
                messages=question.messages,  # type: ignore[arg-type]
                temperature=TEMPERATURE,
                **request,
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise RefusedError(_said(error)) from error
        except openai.APITimeoutError as error:
            raise MilepostError(
                f"{self.base_url} did not answer within {self._timeout_seconds:g} s,"
                f" {NUM_RETRIES + 1} times",
                hint="give it longer (--timeout-seconds) or less to do at once (--concurrency 1)",
            ) from error
        except openai.APIConnectionError as error:
            raise self._away(error) from error
        except openai.APIStatusError as error:
            raise self._refusal(error, model=question.model) from error
        completion = _chat_completion(raw.text)
        if completion is None:
            raise MilepostError(
                f"{self.base_url} does not answer as an OpenAI-compatible server",
                hint=_CHECK_ADDRESS,
            )
        return Reply(
            completion=completion,
            request=request,
            seconds=time.monotonic() - started,
            retries=raw.retries_taken,
            time=self._now(),
        )

    def _away(self, error: openai.APIConnectionError) -> MilepostError:
        cause = error.__cause__
        reason = _one_line(str(cause)) if cause is not None and str(cause) else "no connection"
        return MilepostError(
            f"cannot reach {self.base_url}: {reason}",
            hint="start the server, or check --base-url; the same command goes on",
        )

    def _refusal(self, error: openai.APIStatusError, *, model: str) -> MilepostError:
        hint: str | None = "the same command goes on where this one stopped"
        if error.status_code in (401, 403):
            hint = "give the name of the variable that holds the key with --api-key-env"
        elif error.status_code == 404 and self._models and model not in self._models:
            shown = ", ".join(self._models[:_MOST_MODELS_SAID])
            more = ", ..." if len(self._models) > _MOST_MODELS_SAID else ""
            hint = f"it has these models: {shown}{more}"
        elif error.status_code == 404:
            hint = _CHECK_ADDRESS
        return MilepostError(
            f"{self.base_url} says {error.status_code}: {_said(error)}",
            hint=hint,
        )


_CHECK_ADDRESS = "check --base-url (most end in /v1) and --model"


def _response_format(question: Question, form: str) -> dict[str, Any]:
    """The part of a request that demands a form."""
    if form == "text":
        return {}
    demanded: dict[str, Any] = {"type": form}
    if form == "json_schema":
        schema = reply_schema(question.criteria)
        demanded |= {"json_schema": {"name": "scores", "strict": True, "schema": schema}}
    return {"response_format": demanded}


def _chat_completion(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(value, dict) and isinstance(value.get("choices"), list)
    return value if is_one else None


def _said(error: openai.APIStatusError) -> str:
    """The server's own words."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    for name in ("message", "detail", "error"):
        if isinstance(body, dict) and isinstance(body.get(name), str):
            return _one_line(body[name])
    text = body if isinstance(body, str) else error.response.text
    return _one_line(text) or error.response.reason_phrase


def _one_line(text: str) -> str:
    """Of another machine's text what a terminal can show."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 2 * _LONGEST_SAID])
    plain = " ".join(plain.split())
    return plain if len(plain) <= _LONGEST_SAID else plain[:_LONGEST_SAID] + "…"
