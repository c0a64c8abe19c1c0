"""Replies in OpenAI's form: whole, or in chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from milepost.api.answers import Opened, Piece, TokenScore


@dataclass
class _Choice:
    """A completion as it grows."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None


class CompletionReply:
    """A reply of /v1/completions."""

    def __init__(
        self, *, reply_id: str, created: int, num_choices: int, num_likeliest: int | None
    ) -> None:
        """An empty reply.

        Args:
            reply_id: unique.
            created: seconds since 1970.
            num_choices: completions.
            num_likeliest: of log probabilities that were asked for; None: of none.
        """
        self._head: dict[str, Any] = {"id": self._prefix + reply_id, "created": created}
        self._choices = [_Choice() for _ in range(num_choices)]
        self._num_likeliest = num_likeliest
        self._prompt_tokens = 0
        self._completion_tokens = 0

    _prefix = "cmpl-"
    _whole = "text_completion"
    _chunk = "text_completion"

    def open(self, opened: Opened) -> None:
        """Says which model answers."""
        self._head |= {"model": opened.model, "system_fingerprint": opened.fingerprint}
        self._prompt_tokens = opened.prompt_tokens

    def add(self, piece: Piece) -> None:
        """Adds to a completion."""
        choice = self._choices[piece.choice]
        choice.texts.append(piece.text)
        choice.tokens += piece.tokens
        choice.finish_reason = piece.finish_reason or choice.finish_reason
        self._completion_tokens += piece.num_tokens

    def whole(self) -> dict[str, Any]:
        """The reply with everything added."""
        choices = [
            self._choice(
                number,
                text="".join(choice.texts),
                tokens=choice.tokens,
                finish_reason=choice.finish_reason,
            )
            for number, choice in enumerate(self._choices)
        ]
        return self._head | {"object": self._whole, "choices": choices, "usage": self._usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece, as a stream has it."""
        return self._as_chunk(
            [
                self._part(
                    piece.choice,
                    text=piece.text,
                    tokens=piece.tokens,
                    finish_reason=piece.finish_reason,
                )
            ]
        )

    def usage_chunk(self) -> dict[str, Any]:
        """The counts at the end of a stream."""
        return self._as_chunk([]) | {"usage": self._usage()}

    def _as_chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": self._chunk, "choices": choices}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def _choice(
        self, number: int, *, text: str, tokens: Sequence[TokenScore], finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason,
        }

    _part = _choice

    def _logprobs(self, tokens: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self._num_likeliest is None:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": [token.likeliest for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class ChatReply(CompletionReply):
    """A reply of /v1/chat/completions."""

    _prefix = "chatcmpl-"
    _whole = "chat.completion"
    _chunk = "chat.completion.chunk"

    def first_chunks(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        nothing = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [
            self._as_chunk([{"index": number} | nothing]) for number in range(len(self._choices))
        ]

    def _choice(
        self, number: int, *, text: str, tokens: Sequence[TokenScore], finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason,
        }

    def _part(
        self, number: int, *, text: str, tokens: Sequence[TokenScore], finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self._num_likeliest is None:
            return None
        content = [
            _chat_token(token.text, token.log_probability)
            | {"top_logprobs": [_chat_token(*pair) for pair in self._likeliest(token)]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _likeliest(self, token: TokenScore) -> list[tuple[str, float]]:
        """Without the token itself where it is none of them, unlike in completions."""
        return list((token.likeliest or {}).items())[: self._num_likeliest]


def _chat_token(text: str, log_probability: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": log_probability, "bytes": list(text.encode())}
