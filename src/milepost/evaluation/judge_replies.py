"""The raw replies of judges: a log that is kept, and that answers the same question again.

What identifies a question is what was asked, of which model, and which time; not the server's
address and not the form in which the reply was demanded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.files import append_json_line, read_json_lines, sha256_of_json
from milepost.evaluation.judge_prompt import Message

SCHEMA_VERSION = 1
TEMPERATURE = 0.0


@dataclass(frozen=True)
class Question:
    """One request to a judge.

    Attributes:
        model: as the server names it.
        messages: what is asked.
        criteria: in the order in which they are asked.
        repeat: 0 the first time the judge sees the sample, 1 the second.
        sample_id: which completion it is about; for people who read the log.
    """

    model: str
    messages: Sequence[Message]
    criteria: tuple[str, ...]
    repeat: int
    sample_id: str

    @property
    def key(self) -> str:
        """Hash of what was asked."""
        asked = {"model": self.model, "messages": list(self.messages), "repeat": self.repeat}
        return sha256_of_json(asked | {"temperature": TEMPERATURE})


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Attributes:
        completion: the chat completion, as the server sent it.
        request: what was sent besides the messages: the reply's form and its longest length.
        seconds: from the request to the reply.
        retries: requests before it that failed and were sent again.
        time: UTC, ISO 8601.
    """

    completion: dict[str, Any]
    request: dict[str, Any]
    seconds: float
    retries: int
    time: str

    @property
    def text(self) -> str:
        """What the model said; empty where it said nothing."""
        content = self._choice("message", "content")
        return content if isinstance(content, str) else ""

    @property
    def problem(self) -> str | None:
        """Why the text is not what the model would have said, if the server says so."""
        if self.cut_at_tokens is not None:
            return f"it was cut off at {self.cut_at_tokens} tokens"
        is_filtered = self._choice("finish_reason") == "content_filter"
        if is_filtered or self._choice("message", "refusal"):
            return "the model refused to answer"
        return None

    @property
    def cut_at_tokens(self) -> int | None:
        """The longest length allowed, where the reply reached it; else None."""
        if self._choice("finish_reason") != "length":
            return None
        longest = self.request.get("max_tokens")
        return longest if isinstance(longest, int) else 0

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Tokens of the question and of the reply; None where the server does not say."""
        usage = self.completion.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        asked, said = counts.get("prompt_tokens"), counts.get("completion_tokens")
        if isinstance(asked, int) and isinstance(said, int) and asked >= 0 and said >= 0:
            return asked, said
        return None

    def _choice(self, *names: str) -> Any:
        choices = self.completion.get("choices")
        value = choices[0] if isinstance(choices, list) and choices else None
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


class ReplyLog:
    """The replies on record, by question; a later one counts."""

    def __init__(self, path: Path) -> None:
        """Reads the log.

        Raises:
            StorageError: it is there and cannot be read.
        """
        self.path = path
        lines, self.num_bad_lines = read_json_lines(path)
        self._replies: dict[str, Reply] = {}
        for line in lines:
            reply = _reply(line)
            if reply is None:
                self.num_bad_lines += 1
            else:
                self._replies[line["key"]] = reply

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, question: Question) -> Reply | None:
        """What was answered to this question before."""
        return self._replies.get(question.key)

    def append(self, question: Question, reply: Reply) -> None:
        """Records a reply, on the disk before this returns: it may have cost money.

        Raises:
            StorageError: the line could not be written.
        """
        line = {
            "v": SCHEMA_VERSION,
            "key": question.key,
            "sample_id": question.sample_id,
            "repeat": question.repeat,
            "request": {
                "model": question.model,
                "messages": list(question.messages),
                "temperature": TEMPERATURE,
            }
            | reply.request,
            "reply": reply.completion,
            "seconds": round(reply.seconds, 3),
            "retries": reply.retries,
            "time": reply.time,
        }
        append_json_line(self.path, line, is_durable=True)
        self._replies[question.key] = reply


def _reply(line: dict[str, Any]) -> Reply | None:
    kinds = {"reply": dict, "request": dict, "seconds": int | float, "retries": int, "time": str}
    if not isinstance(line.get("key"), str) or not all(
        isinstance(line.get(name), kind) for name, kind in kinds.items()
    ):
        return None
    return Reply(line["reply"], line["request"], line["seconds"], line["retries"], line["time"])
