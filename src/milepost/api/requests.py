"""Requests as clients send them, checked field by field, and as the rest of the API sees them.

A field that asks for something this server has not is refused by name, unless its value asks for
nothing (`frequency_penalty: 0`); labels that a client puts on its requests are accepted.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from milepost.api.refusals import RefusedError, shown
from milepost.text.chat_template import Message

MOST_ROWS = 128
"""Completions of one request: prompts times `n`."""

MOST_LIKELIEST = 20
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 500
MOST_MESSAGES = 1000
DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as OpenAI's; a chat's answer goes on to the end of the context."""

_NOTHING_ASKED: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of OpenAI's that are not offered, with the values that ask for nothing."""

_LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")


@dataclass(frozen=True)
class Request:
    """What a client wants, checked as far as it can be without the model.

    Attributes:
        model: the name of a model, as the client gave it.
        prompts: texts or token ids; empty where it is a chat.
        messages: of a chat; None: no chat.
        num_choices: completions of each prompt.
        max_tokens: most tokens of a completion; None: as many as the context takes.
        temperature: 0: greedy.
        top_k: only the k likeliest tokens; None: all.
        top_p: only the likeliest tokens that together have this probability; None: all.
        seed: of the draws; None: another one each time.
        stop: texts that end a completion.
        echo: whether the prompt is a part of the reply.
        num_likeliest: log probabilities of each token and of so many of the likeliest; None: of
            none.
        is_streamed: whether the reply comes in pieces.
        has_usage: whether a streamed reply ends with its counts.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[Message, ...] | None
    num_choices: int
    max_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    echo: bool
    num_likeliest: int | None
    is_streamed: bool
    has_usage: bool


def completion_request(body: bytes, *, most_tokens: int | None) -> Request:
    """The request of /v1/completions.

    Args:
        body: of the HTTP request.
        most_tokens: the server's bound on a completion; None: the model's context.

    Raises:
        RefusedError: it is not JSON, or a field is missing, unknown or out of range.
    """
    form = _read(_CompletionForm, body)
    # What a client does not ask for is no reason to refuse it.
    default = DEFAULT_MAX_TOKENS if most_tokens is None else min(DEFAULT_MAX_TOKENS, most_tokens)
    max_tokens = default if form.max_tokens is None else form.max_tokens
    if max_tokens == 0 and not form.echo:
        raise RefusedError("max_tokens is 0, and echo is not asked for", param="max_tokens")
    prompts = _prompts(form.prompt)
    num_choices = form.n or 1
    if len(prompts) * num_choices > MOST_ROWS:
        raise RefusedError(
            f"{len(prompts)} prompts with n = {num_choices} are {len(prompts) * num_choices} "
            f"completions, at most {MOST_ROWS} are made in one request",
            param="prompt",
        )
    return Request(
        prompts=prompts,
        messages=None,
        max_tokens=_bounded(max_tokens, most_tokens=most_tokens, param="max_tokens"),
        echo=bool(form.echo),
        num_likeliest=form.logprobs,
        **_in_common(form),
    )


def chat_request(body: bytes, *, most_tokens: int | None) -> Request:
    """The request of /v1/chat/completions; see `completion_request`."""
    form = _read(_ChatForm, body)
    if form.max_tokens is not None and form.max_completion_tokens is not None:
        raise RefusedError(
            "give max_tokens or max_completion_tokens, not both", param="max_completion_tokens"
        )
    name = "max_tokens" if form.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = form.max_tokens or form.max_completion_tokens or most_tokens
    if form.top_logprobs is not None and not form.logprobs:
        raise RefusedError("top_logprobs needs logprobs: true", param="top_logprobs")
    return Request(
        prompts=(),
        messages=_messages(form.messages),
        max_tokens=_bounded(max_tokens, most_tokens=most_tokens, param=name),
        echo=False,
        num_likeliest=(form.top_logprobs or 0) if form.logprobs else None,
        **_in_common(form),
    )


def _in_common(form: _Form) -> dict[str, Any]:
    options = form.stream_options
    if options is not None and not form.stream:
        raise RefusedError("stream_options needs stream: true", param="stream_options")
    return {
        "model": form.model,
        "num_choices": form.n or 1,
        "temperature": 1.0 if form.temperature is None else float(form.temperature),
        "top_k": form.top_k,
        "top_p": form.top_p,
        "seed": form.seed,
        "stop": _stops(form.stop),
        "is_streamed": bool(form.stream),
        "has_usage": bool(options and options.include_usage),
    }


def _bounded(max_tokens: int | None, *, most_tokens: int | None, param: str) -> int | None:
    if max_tokens is not None and most_tokens is not None and max_tokens > most_tokens:
        raise RefusedError(
            f"{param} is {max_tokens}, this server makes at most {most_tokens} tokens",
            param=param,
        )
    return max_tokens


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: Annotated[str, Field(min_length=1, max_length=1000)]
    n: Annotated[int, Field(ge=1, le=MOST_ROWS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


_Count = Annotated[int, Field(ge=1, lt=2**31)]


_AnyForm = TypeVar("_AnyForm", bound="_Form")


class _CompletionForm(_Form):
    prompt: Any
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None


def _joined_parts(content: Any) -> Any:
    """The text of a message that comes in parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text"):
            raise ValueError("this model reads text only; a part of another type was given")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a part has a type and a text, and nothing else")
    return "".join(part["text"] for part in content)


class _MessageForm(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    refusal: None = None


class _ChatForm(_Form):
    messages: Annotated[list[_MessageForm], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None


def _read(form: type[_AnyForm], body: bytes) -> _AnyForm:
    values = _parsed(body)
    _refuse_what_is_not_offered(values, form=form)
    values = {name: value for name, value in values.items() if name in form.model_fields}
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise _refusal_of(error.errors()[0]) from error


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise RefusedError(f"the body is not JSON: {reason}") from error
    if not isinstance(values, dict):
        raise RefusedError("the body is not a JSON object")
    return values


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _refuse_what_is_not_offered(values: dict[str, Any], *, form: type[_Form]) -> None:
    for name, value in values.items():
        if name in form.model_fields or name in _LABELS:
            continue
        if name not in _NOTHING_ASKED:
            near = difflib.get_close_matches(name, form.model_fields, n=1)
            more = f"; did you mean {near[0]}?" if near else ""
            raise RefusedError(f"there is no parameter {shown(name)}{more}", param=_param(name))
        if value not in _NOTHING_ASKED[name]:
            raise RefusedError(f"{name} is not offered by this server: leave it out", param=name)


def _param(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()[:100]


def _refusal_of(problem: ErrorDetails) -> RefusedError:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return RefusedError(f"{where} is missing", param=where)
    if problem["type"] == "extra_forbidden":
        return RefusedError(f"there is no parameter {shown(where)}", param=_param(where))
    told = problem["msg"].removeprefix("Value error, ")
    told = told[:1].lower() + told[1:]
    seen = "" if problem["type"] == "value_error" else f", not {shown(problem['input'])}"
    return RefusedError(f"{where}: {told}{seen}", param=where)


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(given, str):
        return (given,)
    if isinstance(given, list) and given:
        if all(isinstance(part, str) for part in given):
            return tuple(given)
        if _are_ids(given):
            return (tuple(given),)
        if all(isinstance(part, list) and part and _are_ids(part) for part in given):
            return tuple(tuple(part) for part in given)
    raise RefusedError(
        "prompt must be a text, a list of texts, a list of token ids or a list of such lists, "
        f"none of them empty lists, not {shown(given)}",
        param="prompt",
    )


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _stops(given: Any) -> tuple[str, ...]:
    texts = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RefusedError(
            f"stop must be a text or a list of texts, not {shown(given)}", param="stop"
        )
    if len(texts) > MOST_STOPS or any(not 0 < len(t) <= MOST_STOP_CHARACTERS for t in texts):
        raise RefusedError(
            f"stop takes at most {MOST_STOPS} texts of 1 to {MOST_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(texts)


def _messages(forms: list[_MessageForm]) -> tuple[Message, ...]:
    roles = {"developer": "system"}
    return tuple(
        Message(role=roles.get(form.role, form.role), content=form.content)  # type: ignore[arg-type]
        for form in forms
    )
