"""What the API makes of a request's body: taken, refused by name, never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from milepost.api.refusals import RefusedError
from milepost.api.requests import MOST_ROWS, Request, chat_request, completion_request
from milepost.text.chat_template import Message

ASKED = {"model": "run", "prompt": "The"}
CHAT = {"model": "run", "messages": [{"role": "user", "content": "Who?"}]}


def completion(**changes: Any) -> Request:
    return completion_request(json.dumps(ASKED | changes).encode(), most_tokens=100)


def chat(**changes: Any) -> Request:
    return chat_request(json.dumps(CHAT | changes).encode(), most_tokens=100)


def refusal(body: bytes, *, read=completion_request) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        read(body, most_tokens=100)
    assert 400 <= caught.value.status < 500
    json.dumps(caught.value.content).encode()
    caught.value.content["error"]["message"].encode()  # no half characters
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("The", ("The",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 0], ((1, 2, 0),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_is_a_text_token_ids_or_several_of_either(prompt: Any, read: Any) -> None:
    assert completion(prompt=prompt).prompts == read


@pytest.mark.parametrize(
    "prompt",
    [None, 3, {}, [], [[]], ["a", 1], [1, "a"], [[1], "a"], [-1], [1.5], [True], [[1, -2]]],
)
def test_other_prompts_are_refused_with_what_one_can_be(prompt: Any) -> None:
    refused = refusal(json.dumps(ASKED | {"prompt": prompt}).encode())
    assert refused.param == "prompt"
    assert refused.message.startswith("prompt must be a text, a list of texts, a list of token ids")


def test_null_is_the_default_of_every_field() -> None:
    names = ("n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "echo")
    names += ("logprobs", "stream_options", "logit_bias", "suffix", "user", "best_of")
    plain = completion()
    assert completion(**dict.fromkeys(names)) == plain
    assert (plain.max_tokens, plain.temperature, plain.num_likeliest) == (16, 1.0, None)
    assert chat().max_tokens == 100 and chat().messages == (Message("user", "Who?"),)


def test_values_that_ask_for_nothing_and_labels_are_taken() -> None:
    assert completion(frequency_penalty=0.0, best_of=1, logit_bias={}, user="me") == completion()
    nothing = {"tools": [], "response_format": {"type": "text"}, "metadata": {"a": "b"}}
    assert chat(**nothing) == chat()


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not offered"),
        ({"best_of": 3}, "best_of", "best_of is not offered"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not offered"),
        ({"temprature": 1}, "temprature", "there is no parameter 'temprature'; did you mean temp"),
        ({"n": 0}, "n", "n: input should be greater than or equal to 1, not 0"),
        ({"n": "2"}, "n", "n: input should be a valid integer, not '2'"),
        ({"n": True}, "n", "n: input should be a valid integer, not True"),
        ({"n": MOST_ROWS, "prompt": ["a", "b"]}, "prompt", "are 256 completions, at most 128"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: input should be greater"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, and echo is not asked for"),
        ({"max_tokens": 101}, "max_tokens", "max_tokens is 101, this server makes at most 100"),
        ({"max_tokens": 2**63}, "max_tokens", "max_tokens: input should be less than"),
        ({"temperature": -0.1}, "temperature", "temperature: input should be greater"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2, not 2.1"),
        ({"top_p": 0}, "top_p", "top_p: input should be greater than 0, not 0"),
        ({"top_p": 1.01}, "top_p", "top_p: input should be less"),
        ({"top_k": 0}, "top_k", "top_k: input should be greater"),
        ({"logprobs": 21}, "logprobs", "logprobs: input should be less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "logprobs: input should be a valid integer"),
        ({"stop": [1]}, "stop", "stop must be a text or a list of texts, not [1]"),
        ({"stop": ""}, "stop", "stop takes at most 16 texts of 1 to 500 characters"),
        ({"stop": ["a"] * 17}, "stop", "stop takes at most 16 texts"),
        ({"model": ""}, "model", "model: string should have at least 1 character"),
        ({"model": None}, "model", "model: input should be a valid string, not None"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"\ud800": 1}, "\\ud800", "there is no parameter '\\ud800'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    changes: dict[str, Any], param: str, message: str
) -> None:
    refused = refusal(json.dumps(ASKED | changes).encode())
    assert refused.param == param
    assert message in refused.message


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "messages: list should have at least 1 item"),
        ({"messages": "Who?"}, "messages", "messages: input should be a valid list"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'assistant', not"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
            "this model reads text only",
        ),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "not both"),
        ({"max_completion_tokens": 101}, "max_completion_tokens", "is 101, this server makes at"),
        ({"top_logprobs": 1}, "top_logprobs", "top_logprobs needs logprobs: true"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not offered"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not offered"),
        ({"prompt": "a"}, "prompt", "there is no parameter 'prompt'"),
    ],
)
def test_a_chat_that_cannot_be_had_is_refused_by_name(
    changes: dict[str, Any], param: str, message: str
) -> None:
    refused = refusal(json.dumps(CHAT | changes).encode(), read=chat_request)
    assert refused.param == param
    assert message in refused.message


def test_messages_in_parts_are_joined_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    )
    assert asked.messages == (Message("system", "Be brief."), Message("user", "ab"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON: Expecting value"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe{", "the body is not JSON"),
        (b"[]", "the body is not a JSON object"),
        (b"[" * 100_000, "the body is not JSON: it is nested too deep"),
        (b'{"model": NaN}', "the body is not JSON: NaN is not a JSON value"),
        (b'{"n": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"model": "run", "prompt": "a", "temperature": 1e999}', "temperature: input should be"),
        (b'{"prompt": "a"}', "model is missing"),
        (b'{"model": "run"}', "prompt is missing"),
    ],
)
def test_bodies_that_are_no_requests_are_refused(body: bytes, message: str) -> None:
    assert refusal(body).message.startswith(message)


def test_a_long_value_is_not_sent_back_whole() -> None:
    assert len(refusal(json.dumps(ASKED | {"n": "x" * 10_000}).encode()).message) < 300
