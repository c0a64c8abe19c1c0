"""Ids of many texts, many times faster: fastokens, held against the tokenizer's own codec.

The tokenizer stays the oracle. A sample of hostile texts is compared when the fast encoder is
opened, and one text in a thousand after that; where it cannot be opened, the tokenizer does the
work alone. The ids are the same either way (docs/decisions/0010-fast-encoding.md).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from milepost.core.errors import MilepostError
from milepost.text.byte_level import END_OF_TEXT
from milepost.text.codecs import MAX_ENCODED_CHARACTERS, Ids, parts
from milepost.text.tokenizer import Tokenizer, checked

if TYPE_CHECKING:
    import fastokens

CHECK_EVERY = 1000
"""One text in so many is encoded by the tokenizer as well: about 1 % of the time."""

SHOWN_CHARACTERS = 80

_REMOVE_IT = "remove it (pip uninstall fastokens) and prepare again into a new folder"

_GO_ON_WITHOUT = "remove it (pip uninstall fastokens): the same command goes on without it"

_INSTALL_IT = "pip install 'milepost[fast]' makes the encoding 15 times faster or more"

_THREADS_VARIABLE = "FASTOKENS_BPE_THREADS"

HOSTILE_TEXTS = (
    "",
    " ",
    "  \n\n \t x \r\n",
    "tail \n \n",
    "I'll we've 's 'S it's 'll'LL ’s don''t",
    f"{END_OF_TEXT} a{END_OF_TEXT}{END_OF_TEXT}b <|im_start|>",
    "naïve café — “quotes” … ½ ² ٣ Ⅷ ǅ ª",
    "日本語の文章、中文字符。한국어 ภาษาไทย हिन्दी العربية",
    "👩‍👩‍👧‍👦🇫🇷 e\u0301\u200d\ufeff\u00ad\u180e\u034f",
    "".join(map(chr, range(0x250))),
    "\x1c\x1d a\x1e \x1f\x85b\xa0 c\u1680\u2003 d\u2028\u2029\u202f\u205f\u3000x",
    "\ufffd\uffff\U0001f9ff\U000e0001\U0010ffff",
    "def f(x):\n        return x  # comment\n\n\n\tif 1234567890 == 12,345.678e-9:",
    "a" * 3000 + " " * 3000 + "\n" * 3000 + "7" * 3000 + "!" * 3000 + "é" * 3000 + "漢" * 3000,
    "ab" * 2000 + "'s" * 2000 + " \u3000\n" * 2000 + "\u0301" * 2000,
    "The quick brown fox, jumping over 13 lazy dogs; didn't it? " * 400,
)
"""Compared when a fast encoder is opened: what tells encoders apart, and every size of path."""


class NoFastEncoderError(MilepostError):
    """There is no fast encoder for this tokenizer here; the message is why."""


class FastEncoder:
    """Texts to ids through fastokens, in the calling thread alone.

    Its cache of words takes up to 240 MB.

    Attributes:
        name: of the encoder, with its version.
    """

    def __init__(self, tokenizer: Tokenizer, *, encoder: fastokens.Tokenizer, name: str) -> None:
        """`open_fast_encoder` makes them."""
        self.name = name
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._until_check = 0

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text as uint32 arrays, those of `Tokenizer.encode_batch`.

        Raises:
            DataError: a text holds a lone surrogate.
            MilepostError: fastokens gave other ids than the tokenizer for a text, or failed.
        """
        arrays = self.encode_unchecked(texts)
        for place in range(self._until_check, len(texts), CHECK_EVERY):
            if problem := self.difference(texts[place], arrays[place]):
                raise MilepostError(problem, hint=_REMOVE_IT)
        self._until_check = (self._until_check - len(texts)) % CHECK_EVERY
        return arrays

    def encode_unchecked(self, texts: Sequence[str]) -> list[Ids]:
        """As `encode_batch`, what fastokens says alone."""
        # Only long texts are cut, which bounds what they take; white space needs no care here.
        cut = [(t,) if len(t) <= MAX_ENCODED_CHARACTERS else tuple(parts(t)) for t in texts]
        flat = [part for whole in cut for part in whole]
        with _failures(self.name):
            try:
                ids, offsets = self._encoder.encode_batch_flat(flat, split_special_tokens=True)
            except UnicodeEncodeError:
                for text in texts:
                    checked(text)
                raise
            tokens = np.frombuffer(ids, dtype="<u4")
            ends = np.frombuffer(offsets, dtype="<u8")[np.cumsum([0, *map(len, cut)])].tolist()
            return [tokens[begin:end] for begin, end in itertools.pairwise(ends)]

    def difference(self, text: str, ids: Ids) -> str | None:
        """What is wrong with the ids of a text, for people; None where they are right."""
        (right,) = self._tokenizer.encode_batch([text])
        if np.array_equal(ids, right):
            return None
        begin = text[:SHOWN_CHARACTERS]
        return f"{self.name} gives other ids than the tokenizer itself for a text: {begin!r}"


@contextlib.contextmanager
def _failures(name: str) -> Iterator[None]:
    """Turns whatever the library raises into a MilepostError.

    Another version of it may have other functions, and what Rust calls a panic is no Exception.
    """
    try:
        yield
    except MilepostError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = f"{name} failed: {type(error).__name__}: {error}"
        raise MilepostError(what, hint=_GO_ON_WITHOUT) from error


def open_fast_encoder(tokenizer: Tokenizer) -> FastEncoder:
    """The fast encoder of a tokenizer, once it gave the ids of the tokenizer for `HOSTILE_TEXTS`.

    Raises:
        NoFastEncoderError: fastokens is not installed, the tokenizer is none of byte-level BPE
            with GPT-2's pattern, it fails, or an id differs.
    """
    content = tokenizer.gpt2_like()
    if content is None:
        raise NoFastEncoderError("the tokenizer is not of GPT-2's kind (byte-level BPE)")
    # Read once, at its first work: without it fastokens starts a thread a core in every worker.
    os.environ[_THREADS_VARIABLE] = "1"
    try:
        import importlib.metadata

        with _failures("fastokens"):
            import fastokens

            name = f"fastokens {importlib.metadata.version('fastokens')}"
            library = fastokens.Tokenizer.from_json_str(json.dumps(content))
        encoder = FastEncoder(tokenizer, encoder=library, name=name)
        arrays = encoder.encode_unchecked(HOSTILE_TEXTS)
    except MilepostError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise NoFastEncoderError("fastokens is not installed", hint=_INSTALL_IT) from error
        raise NoFastEncoderError(error.message) from error
    if len(arrays) != len(HOSTILE_TEXTS):
        raise NoFastEncoderError(f"{name} encodes {len(HOSTILE_TEXTS)} texts as {len(arrays)}")
    for text, ids in zip(HOSTILE_TEXTS, arrays, strict=True):
        if problem := encoder.difference(text, ids):
            raise NoFastEncoderError(problem)
    return encoder
