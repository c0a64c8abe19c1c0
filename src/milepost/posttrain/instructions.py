"""Instruction data: rows of Alpaca, messages or ShareGPT as conversations, with a ledger.

A row that cannot be trained on is left out and counted with its reason; a file that is damaged,
or not what the first rows say, is refused. Nothing is mended and nothing is lost silently.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.core.errors import DataError
from milepost.data.hub import Fetcher
from milepost.data.sources import HUB_PREFIX, SourceFile, find_files
from milepost.evaluation.rows import ROW_FORMS, Row, read_rows, shown
from milepost.posttrain.ledger import Drop, Ledger
from milepost.text.chat_template import Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
"""Who speaks, as `messages` and ShareGPT call them."""

_HINT = (
    "each row has instruction, input and output (Alpaca), or messages with role and content, "
    "or conversations with from and value (ShareGPT)"
)


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn, the last one an answer; perhaps a system message first.

    Attributes:
        messages: two or more, none of them empty, without white space around.
        source: the file it came from.
        line: its line, or its row in a table or list, from 1.
    """

    messages: tuple[Message, ...]
    source: str
    line: int

    @property
    def sha256(self) -> str:
        """Hash of who says what; the same in any file and form."""
        text = json.dumps([asdict(message) for message in self.messages], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


class _Unusable(Exception):
    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what


def read_conversations(source: str) -> tuple[list[Conversation], Ledger]:
    """All usable conversations of a source, in order, and what became of the other rows.

    The form of the rows is that of the first row which has one; all files have the same.

    Args:
        source: a file or folder of .json (a list), .jsonl(.gz, .zst) or .parquet, or
            `hf://datasets/owner/name[@revision][/path]`.

    Raises:
        DataError: there is no such source, a file is damaged, its rows are of no known form or
            of several, or none of them can be used.
        UsageError: it is not the name of a dataset on the hub.
    """
    files = find_instructions(source)
    conversations: list[Conversation] = []
    drops: list[Drop] = []
    name: str | None = None
    num_rows = 0
    for file, path in _at_hand(files):
        rows = read_rows(file.name, path)
        name = name or _form_of_rows(rows)
        num_rows += len(rows)
        for row in rows:
            _check_form(row, name)
            try:
                messages = _checked([*_system(row.fields), *_READERS[name](row.fields)])
                conversations.append(Conversation(messages, row.file, row.number))
            except _Unusable as problem:
                drops.append(Drop(row.file, row.number, problem.reason, problem.what))
    ledger = Ledger(num_rows, tuple(drops))
    if not conversations:
        first = drops[0]
        raise DataError(
            f"no row of {source} can be used: {ledger.summary()}",
            hint=f"the first is {first.source}:{first.line}: {first.what}",
        )
    return conversations, ledger


def find_instructions(source: str) -> list[SourceFile]:
    """The files of a source, as `read_conversations` reads them.

    Raises:
        DataError, UsageError: as there; the files are not opened.
    """
    if not source.startswith(HUB_PREFIX) and not Path(source).exists():
        raise DataError(
            f"there is no instruction data at {source}",
            hint="check the path; a dataset on the hub is hf://datasets/owner/name",
        )
    return find_files([source], forms=ROW_FORMS)


def split_held_out(
    conversations: Sequence[Conversation], *, fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Parts conversations in those to train on and those held out, both in order.

    Where one goes is a function of what it says: it stays there when data is added, moved or
    read from another file, and two that are equal go the same way.

    Args:
        conversations: all of them.
        fraction: about so many are held out, 0 to 1.

    Returns:
        (to train on, held out).
    """
    bound = round(fraction * (1 << 64))
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        parts[int(conversation.sha256[:16], 16) < bound].append(conversation)
    return parts


def _at_hand(files: list[SourceFile]) -> Iterator[tuple[SourceFile, Path]]:
    """Each file and where it lies; those of the hub lie there for their turn only."""
    if all(file.path is not None for file in files):
        yield from ((file, file.path) for file in files if file.path is not None)
        return
    with (
        tempfile.TemporaryDirectory(prefix="milepost-") as folder,
        Fetcher(Path(folder), files=files) as fetcher,
    ):
        for file in files:
            yield file, fetcher.path(file)
            fetcher.forget(file)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")


_KEYS = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
}
"""The fields that tell a form."""


def _form_of_rows(rows: Sequence[Row]) -> str:
    for row in rows:
        for name, keys in _KEYS.items():
            if all(row.fields.get(key) is not None for key in keys):
                return name
    fields = ", ".join(map(shown, rows[0].fields)) or "none"
    raise DataError(
        f"the rows of {rows[0].file} are of no known form; the first has the fields {fields}",
        hint=_HINT,
    )


def _check_form(row: Row, name: str) -> None:
    """Refuses a row of another form; one that lacks its answer is still of its form."""
    if any(key in row.fields for key in _KEYS[name]):
        return
    others = [n for n, keys in _KEYS.items() if any(key in row.fields for key in keys)]
    seen = f"is of the form {others[0]}" if others else "has none of its fields"
    raise DataError(
        f"{row.place} {seen}, the rows before it are of the form {name}",
        hint="keep one form in a file; give the others in a run of their own, or convert them",
    )


def _system(fields: dict[str, Any]) -> Iterator[Message]:
    """What stands beside the turns of any form."""
    _refuse_unread(fields, "history")
    system = _text(fields.get("system"), "field 'system'")
    if system:
        yield Message("system", system)


def _refuse_unread(fields: dict[str, Any], *names: str) -> None:
    """Refuses what would change the conversation and is not read."""
    for name in names:
        if fields.get(name):
            raise _Unusable("unread_field", f"it has {name!r}: {shown(fields[name])}")


def _alpaca(fields: dict[str, Any]) -> Iterator[Message]:
    instruction = _text(fields.get("instruction"), "field 'instruction'")
    more = _text(fields.get("input"), "field 'input'")
    yield Message("user", f"{instruction}\n{more}" if instruction and more else instruction)
    yield Message("assistant", _text(fields.get("output"), "field 'output'"))


def _messages(fields: dict[str, Any]) -> Iterator[Message]:
    return _turns(fields.get("messages"), field="messages", role_key="role", text_key="content")


def _sharegpt(fields: dict[str, Any]) -> Iterator[Message]:
    turns = fields.get("conversations")
    return _turns(turns, field="conversations", role_key="from", text_key="value")


_READERS: dict[str, Callable[[dict[str, Any]], Iterator[Message]]] = {
    "Alpaca": _alpaca,
    "messages": _messages,
    "ShareGPT": _sharegpt,
}


def _turns(turns: Any, *, field: str, role_key: str, text_key: str) -> Iterator[Message]:
    if turns is None or turns == []:
        raise _Unusable("no_turns", f"field {field!r} is empty")
    if not isinstance(turns, list):
        raise _Unusable("no_turns", f"field {field!r} is {_kind(turns)}, not a list")
    for number, turn in enumerate(turns, start=1):
        place = f"message {number}"
        if not isinstance(turn, dict):
            raise _Unusable("not_text", f"{place} is {_kind(turn)}, not an object")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise _Unusable("unknown_role", f"{place} has {role_key!r} {shown(role)}")
        _refuse_unread(turn, "tool_calls")
        yield Message(ROLES[role], _text(turn.get(text_key), place))


def _text(value: Any, place: str) -> str:
    """A text without white space around; nothing is empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Unusable("not_text", f"{place} is {_kind(value)}, not a text")
    if "\0" in value:
        at = value.index("\0")
        raise _Unusable("unusable_character", f"{place} holds a NUL character at character {at}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"{place} holds half a character (a lone surrogate) at character {error.start}"
        raise _Unusable("unusable_character", what) from error
    return value.strip()


def _checked(messages: list[Message]) -> tuple[Message, ...]:
    """The messages, if they are questions and answers in turn; an empty system message is none."""
    system = [message for message in messages[:1] if message.role == "system"]
    turns = messages[len(system) :]
    for number, message in enumerate(turns):
        place = f"message {number + len(system) + 1}"
        expected = "assistant" if number % 2 else "user"
        if message.role != expected:
            what = f"{place} is of the {message.role} where the {expected} takes the turn"
            raise _Unusable("out_of_order", what)
        if not message.content:
            if message.role == "assistant":
                raise _Unusable("no_answer", f"the answer, {place}, is empty")
            raise _Unusable("empty_question", f"the question, {place}, is empty")
    if not turns:
        raise _Unusable("no_turns", "there is neither question nor answer")
    if len(turns) % 2:
        raise _Unusable("no_answer", "it ends with a question")
    return (*(message for message in system if message.content), *turns)
