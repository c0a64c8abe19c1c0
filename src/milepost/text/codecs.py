"""What turns text into token ids and back: tiktoken for GPT-2, tokenizers for the others."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from milepost.core.errors import DataError
from milepost.text.byte_level import (
    END_OF_TEXT,
    GPT2_PATTERN,
    WHITE_SPACE,
    gpt2_ranks,
    gpt2_tokenizer_json,
    is_gpt2_like,
)

if TYPE_CHECKING:
    import tokenizers

MAX_ENCODED_CHARACTERS = 1 << 20
"""GPT-2 encodes longer texts in parts, cut where no token can span the cut."""

LONG_RUN_CHARACTERS = 1000
LONG_WORD_CHARACTERS = 10_000
_LONG_WHITE_SPACE = re.compile(f"[{WHITE_SPACE}]{{{LONG_RUN_CHARACTERS},}}+")
_TWO_WHITE_SPACES = re.compile(f"[{WHITE_SPACE}]{{2}}")
_SOME_LETTERS = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5"
_SOME_SIGNS = r"!-/:-@\[-`{-~\u3001\u3002\uff01-\uff0f"
_INSIDE_A_WORD = f"[{_SOME_LETTERS}](?=[0-9{_SOME_SIGNS}])|[0-9](?=[{_SOME_LETTERS}{_SOME_SIGNS}])"
_SAFE_CUT = re.compile(f"[^{WHITE_SPACE}](?=[{WHITE_SPACE}])|{_INSIDE_A_WORD}")
_END_OF_PIECE = re.compile(f"[{WHITE_SPACE}]|{_INSIDE_A_WORD}")

Ids = np.ndarray
"""Token ids, uint32."""


class Codec(Protocol):
    """What turns text into ids and back."""

    def encode(self, text: str) -> Ids: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def ids_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The control tokens that the tokenizer's own template puts before and after a text."""


class Gpt2Codec:
    """GPT-2 through tiktoken."""

    def __init__(self) -> None:
        import tiktoken

        ranks = gpt2_ranks()
        self._encoding = tiktoken.Encoding(
            "gpt2",
            explicit_n_vocab=len(ranks) + 1,
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: len(ranks)},
        )

    def encode(self, text: str) -> Ids:
        arrays = [self._encode_part(part) for part in parts(text)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def _encode_part(self, part: str) -> Ids:
        if _has_long_word(part):
            return self._slow_codec.encode(part)
        return np.array(self._encoding.encode_ordinary(part), dtype=np.uint32)

    @functools.cached_property
    def _slow_codec(self) -> JsonCodec:
        """For words without end: tiktoken before 0.13 takes quadratic time on them."""
        return JsonCodec(gpt2_tokenizer_json())

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(ids, errors="replace")

    def ids_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), ()


def parts(text: str) -> Iterator[str]:
    """The text in parts whose ids, one after the other, are the ids of the whole.

    GPT-2's pattern never looks back, no piece goes on past a character before white space, nor
    past a letter or number before something of another kind, and a run of white space before a
    word is one piece except for its last character. So it is safe to cut at all these places,
    which are found in Chinese and in base64 as well. Runs of white space are cut out because
    tiktoken's regular expressions overflow the stack on them.
    """
    start = 0
    for begin, end in _long_white_space(text):
        yield from _short_parts(text[start:begin])
        start = end if end == len(text) else end - 1
        yield text[begin:start]
    yield from _short_parts(text[start:])


def _short_parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > MAX_ENCODED_CHARACTERS:
        cut = _SAFE_CUT.search(text, start + MAX_ENCODED_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _has_long_word(text: str) -> bool:
    """Whether 20,000 characters in a row may be one piece, perhaps fewer."""
    starts = range(0, len(text) - LONG_WORD_CHARACTERS + 1, LONG_WORD_CHARACTERS)
    return any(
        _END_OF_PIECE.search(text, start, start + LONG_WORD_CHARACTERS) is None for start in starts
    )


def _long_white_space(text: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of the long runs of white space."""
    # A long run shows as two neighbors among every 500th character: most texts cost nothing.
    if _TWO_WHITE_SPACES.search(text[:: LONG_RUN_CHARACTERS // 2]):
        yield from (match.span() for match in _LONG_WHITE_SPACE.finditer(text))


class JsonCodec:
    """Any tokenizer.json through Hugging Face's tokenizers."""

    def __init__(self, content: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as JsonTokenizer

        try:
            self._tokenizer: tokenizers.Tokenizer = JsonTokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"the tokenizer.json cannot be used: {error}",
                hint="give one that this version of tokenizers reads",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._can_be_cut = is_gpt2_like(content)

    def encode(self, text: str) -> Ids:
        # tokenizers takes 200 bytes of memory a character.
        if self._can_be_cut and len(text) > MAX_ENCODED_CHARACTERS:
            return np.concatenate([self._encode_part(part) for part in parts(text)])
        return self._encode_part(text)

    def _encode_part(self, part: str) -> Ids:
        encoding = self._tokenizer.encode(part, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def ids_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        around = self._tokenizer.encode("", add_special_tokens=True).ids
        if not around:
            return (), ()
        mask = self._tokenizer.encode("a", add_special_tokens=True).special_tokens_mask
        num_before = mask.index(0) if 0 in mask else len(around)
        return tuple(around[:num_before]), tuple(around[num_before:])
