"""Tokens as a reader sees them: where one ends, and each blank in it."""

from __future__ import annotations

import json
import re
from typing import Any

from milepost.text.byte_level import bytes_of_token
from milepost.text.tokenizer import Tokenizer

SPACE, LINE_BREAK, TAB = "·", "⏎", "⇥"

_BLANKS = {" ": SPACE, "\n": LINE_BREAK, "\t": TAB}
_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How a SentencePiece vocabulary names the tokens of single bytes."""


def visible(text: str) -> str:
    """The text with every blank as a sign; what does not print, and the signs themselves, escaped.

    A model can write bytes that steer a terminal.
    """
    return "".join(_BLANKS.get(character) or _printable(character) for character in text)


def on_one_line(text: str) -> str:
    """As `visible`, with spaces left as they are."""
    return visible(text).replace(SPACE, " ")


def _printable(character: str) -> str:
    if character.isprintable() and character not in _BLANKS.values():
        return character
    return character.encode("unicode_escape").decode()


class VisibleTokens:
    """What each id of a vocabulary stands for, by itself.

    A tokenizer's decode will not do: of one token alone it drops what a whole text needs, the
    space before a word or the first half of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        content = json.loads(tokenizer.files()["tokenizer.json"])
        self._control = {entry["id"]: entry["content"] for entry in content.get("added_tokens", [])}
        self._tokens = _tokens_by_id(content["model"]["vocab"])
        self._vocab_size = tokenizer.vocab_size
        self._is_byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))

    def show(self, token_id: int) -> str:
        """One token: `·Berlin`; bytes that are no whole character as \\xNN; `?7` for a gap."""
        if token_id in self._control:
            return visible(self._control[token_id])
        token = self._tokens.get(token_id)
        if token is None:
            return f"?{token_id}"
        data = bytes_of_token(token) if self._is_byte_level else _bytes_of_piece(token)
        if data is None:
            return visible(token)
        return visible(data.decode(errors="surrogateescape")).replace("\\udc", "\\x")

    def classes_aside_from_blanks(self) -> list[int]:
        """A number for each id, the same for tokens that differ only in the blanks before them.

        `Paris`, `·Paris` and `⏎Paris` are one class, and so are all tokens of blanks alone.
        """
        numbers: dict[str, int] = {}
        texts = (self.show(n).lstrip(SPACE + LINE_BREAK + TAB) for n in range(self._vocab_size))
        return [numbers.setdefault(text, len(numbers)) for text in texts]


def _tokens_by_id(vocab: Any) -> dict[int, str]:
    if isinstance(vocab, list):  # Unigram: [token, score] by position
        return {number: entry[0] for number, entry in enumerate(vocab)}
    return {number: token for token, number in vocab.items()}


def _bytes_of_piece(token: str) -> bytes:
    found = _BYTE_TOKEN.fullmatch(token)
    if found:
        return bytes.fromhex(found.group(1))
    return token.replace(_SENTENCEPIECE_SPACE, " ").encode(errors="surrogateescape")
