"""From raw lines, texts and rows to documents, with a reason for each one that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_DOCUMENT_BYTES = 256 << 20
"""A longer line, text file or row is refused; it bounds the memory of a worker."""

MAX_ID_CHARACTERS = 1000
"""A longer id is left out: such a document is named by its place."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

DROP_REASONS = {
    "empty_text": "the text is empty",
    "empty_file": "the file is empty",
    "not_utf8": "not UTF-8",
    "not_json": "not JSON",
    "not_an_object": "not a JSON object",
    "duplicate_key": "the text field stands twice",
    "text_missing": "no text field",
    "text_not_a_string": "the text is not a string",
    "lone_surrogate": "half a character (a lone surrogate)",
    "nul_character": "a NUL character",
    "too_long": "longer than the limit",
    "damaged_file": "the file is damaged from here on",
}
"""Every reason a document may be dropped for."""

HARMLESS_REASONS = frozenset({"empty_text"})
"""Dropped and counted without being asked: there is nothing to lose."""


@dataclass(frozen=True)
class RawDocument:
    """One usable text with its place.

    Attributes:
        line: line of the file or row of the table, from 1.
        text: without lone surrogates and NUL.
        num_bytes: of the text as UTF-8.
        id: its own id, None where it has none.
    """

    line: int
    text: str
    num_bytes: int
    id: str | None


@dataclass(frozen=True)
class Problem:
    """Why something is not a document.

    Attributes:
        line: line of the file or row of the table, from 1.
        reason: one of `DROP_REASONS`.
        what: what was seen, for people.
        count: documents that are lost to it.
    """

    line: int
    reason: str
    what: str
    count: int = 1


class _Unusable(Exception):
    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what


def parse_lines(
    data: bytes, *, first_line: int, text_field: str
) -> Iterator[RawDocument | Problem]:
    """Documents of complete JSON lines; blank lines are passed over.

    Args:
        data: lines that end with a line feed, the last one perhaps without.
        first_line: number of the first of them.
        text_field: the key of the text.
    """
    if first_line == 1:
        data = data.removeprefix(BYTE_ORDER_MARK)
    reader = _ObjectReader()
    for line, raw in enumerate(data.split(b"\n"), start=first_line):
        if not raw.strip():
            continue
        try:
            value = reader.read(raw, text_field=text_field)
            yield _document(line, value.get(text_field), value.get("id"), text_field)
        except _Unusable as problem:
            yield Problem(line, problem.reason, problem.what)


def parse_text(data: bytes) -> RawDocument | Problem:
    """The document that a whole text file is."""
    try:
        text = _decode(data.removeprefix(BYTE_ORDER_MARK))
        return _document(1, text, None, "text")
    except _Unusable as problem:
        return Problem(1, problem.reason, problem.what)


def parse_row(row: int, *, text: Any, own_id: Any, text_field: str) -> RawDocument | Problem:
    """The document of one row of a table; text may come as UTF-8 bytes."""
    try:
        if isinstance(text, bytes):
            text = _decode(text)
        return _document(row, text, own_id, text_field)
    except _Unusable as problem:
        return Problem(row, problem.reason, problem.what)


def _document(line: int, text: Any, own_id: Any, text_field: str) -> RawDocument:
    if text is None:
        raise _Unusable("text_missing", f"has no text in field {text_field!r}")
    if not isinstance(text, str):
        kind = type(text).__name__
        raise _Unusable("text_not_a_string", f"field {text_field!r} is of type {kind}, not text")
    if not text:
        raise _Unusable("empty_text", "the text is empty")
    try:
        data = text.encode()
        has_nul = b"\0" in data  # many times faster than the search in a text that is not ASCII
    except UnicodeEncodeError as error:
        has_nul = "\0" in text
        if not has_nul:
            what = f"holds half a character (a lone surrogate) at character {error.start}"
            raise _Unusable("lone_surrogate", what) from error
    if has_nul:
        place = text.index("\0")
        raise _Unusable("nul_character", f"holds a NUL character at character {place}")
    return RawDocument(line, text, len(data), _usable_id(own_id))


def _usable_id(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value)
    return text if 0 < len(text) <= MAX_ID_CHARACTERS else None


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        what = f"is not UTF-8: byte {data[error.start]:#04x} at byte {error.start}"
        raise _Unusable("not_utf8", what) from error


class _ObjectReader:
    """Reads JSON objects one by one."""

    def __init__(self) -> None:
        self._keys_and_values: list[tuple[str, Any]] = []
        self._decoder = json.JSONDecoder(
            parse_constant=_refuse_constant, object_pairs_hook=self._make_object
        )

    def _make_object(self, keys_and_values: list[tuple[str, Any]]) -> dict[str, Any]:
        self._keys_and_values = keys_and_values  # the outermost object is closed last
        return dict(keys_and_values)

    def read(self, raw: bytes, *, text_field: str) -> dict[str, Any]:
        """The object that `raw` holds, whose own keys name the text once; nested ones may again.

        Raises:
            _Unusable: it is not UTF-8, not JSON, not an object, or names the text twice.
        """
        text = _decode(raw)
        try:
            value = self._decoder.decode(text)
        except RecursionError as error:
            raise _Unusable("not_json", "is nested too deep to be read as JSON") from error
        except ValueError as error:
            raise _Unusable("not_json", f"is not JSON: {error}") from error
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise _Unusable("not_an_object", f"is JSON of type {kind}, not an object")
        if [key for key, _ in self._keys_and_values].count(text_field) > 1:
            raise _Unusable("duplicate_key", f"field {text_field!r} stands twice")
        return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
