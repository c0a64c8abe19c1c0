"""Ids of many texts, many times faster: fastokens, held against the tokenizer's own codec.

The tokenizer stays the oracle. A sample of hostile texts is compared when the fast encoder is
opened, and one text in a thousand after that; where it cannot be opened, the tokenizer does the
work alone. The ids are the same either way (docs/decisions/0010-fast-encoding.md).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
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
            MilepostError: fastokens gave other ids than the tokenizer for a text.
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


def open_fast_encoder(tokenizer: Tokenizer) -> FastEncoder:
    """The fast encoder of a tokenizer, once it gave the ids of the tokenizer for `HOSTILE_TEXTS`.

    Raises:
        NoFastEncoderError: fastokens is not installed, the tokenizer is none of byte-level BPE
            with GPT-2's pattern, or an id differs.
    """
    content = tokenizer.gpt2_like()
    if content is None:
        raise NoFastEncoderError("the tokenizer is not of GPT-2's kind (byte-level BPE)")
    # Read once, at its first work: without it fastokens starts a thread a core in every worker.
    os.environ[_THREADS_VARIABLE] = "1"
    try:
        import importlib.metadata

        import fastokens

        name = f"fastokens {importlib.metadata.version('fastokens')}"
        encoder = FastEncoder(
            tokenizer, encoder=fastokens.Tokenizer.from_json_str(json.dumps(content)), name=name
        )
    except ImportError as error:
        raise NoFastEncoderError(
            "fastokens is not installed", hint="pip install 'milepost[fast]'"
        ) from error
    except Exception as error:  # the library raises plain ones
        raise NoFastEncoderError(f"fastokens cannot use the tokenizer: {error}") from error
    for text, ids in zip(HOSTILE_TEXTS, encoder.encode_unchecked(HOSTILE_TEXTS), strict=True):
        if problem := encoder.difference(text, ids):
            raise NoFastEncoderError(problem)
    return encoder
