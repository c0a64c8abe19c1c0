"""Tokenizers: GPT-2 exact and offline, any tokenizer.json, or one trained on the spot.

A text never becomes a control token, whatever it holds: `encode` gives the end-of-text id for
no text, and callers put it where a document begins.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.errors import DataError, UsageError
from milepost.core.files import sha256_of_json
from milepost.text.byte_level import (
    END_OF_TEXT,
    added_token,
    bytes_of_token,
    gpt2_tokenizer_json,
    is_gpt2_like,
)
from milepost.text.codecs import Codec, Gpt2Codec, Ids, JsonCodec

GPT2 = "gpt2"
GPT2_SHA256 = "414d1ef181aa489bcad13af79545fd97147a4701a18e84840eaed36f20919698"
"""Hash of GPT-2's tokenizer.json as this program makes it; a file that has it is GPT-2."""

END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
"""Looked for in this order where a tokenizer's files do not say which token ends a text."""

MAX_TOKENIZER_BYTES = 1 << 30


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        name: "gpt2", or the name of the folder or file it came from.
        vocab_size: number of ids, the largest id + 1.
        end_of_text_id: the id that stands before each document.
        sha256: hash of the canonical tokenizer.json.
        ids_around: what the tokenizer.json's own template puts before and after a text, as
            Hugging Face's tokenizers do by themselves and `encode` never does.
        beginning_id: what stands before a text that has nothing before it: the token that the
            files call bos_token, else the first of the template, else the end-of-text token.
        control_ids: the ids of all control tokens, by what they are called.
    """

    def __init__(
        self,
        *,
        name: str,
        content: dict[str, Any],
        end_of_text: str,
        beginning: str | None = None,
    ) -> None:
        vocab = _all_tokens(content)
        self.name = name
        self.vocab_size = max(vocab.values()) + 1
        self.end_of_text_id = vocab[end_of_text]
        self.control_ids = _control_ids(content) | {end_of_text: self.end_of_text_id}
        self.sha256 = sha256_of_json(content)
        self._content = content
        self._end_of_text = end_of_text
        self._codec = self._make_codec()
        self._num_bytes = _bytes_of_ids(content, self.vocab_size)
        self.ids_around = self._codec.ids_around()
        first = (*self.ids_around[0], self.end_of_text_id)[0]
        self.beginning_id = vocab.get(beginning, first) if beginning else first

    def _make_codec(self) -> Codec:
        if self.sha256 == GPT2_SHA256:
            return Gpt2Codec()
        codec = JsonCodec(_with_control(self._content, self._end_of_text, self.end_of_text_id))
        if self.end_of_text_id in codec.encode(self._end_of_text):
            raise DataError(
                f"in tokenizer {self.name} the plain text {self._end_of_text} is the control token",
                hint="name a token as eos_token that the tokenizer never makes from text",
            )
        return codec

    def encode(self, text: str) -> list[int]:
        """The ids of a text; what looks like a control token is plain text.

        Raises:
            DataError: the text holds a lone surrogate, so it has no UTF-8 form.
        """
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[Ids]:
        """The ids of each text as uint32 arrays.

        Raises:
            DataError: a text holds a lone surrogate.
        """
        return [self._codec.encode(checked(text)) for text in texts]

    def gpt2_like(self) -> dict[str, Any] | None:
        """A tokenizer.json that does all that `encode` does, where that is what GPT-2 does with
        other merges; else None."""
        if not is_gpt2_like(self._content):
            return None
        content = _with_control(self._content, self._end_of_text, self.end_of_text_id)
        return content | {"post_processor": None, "truncation": None, "padding": None}

    def fewest_tokens(self, text: str) -> int:
        """A number of ids that the text cannot take less than, without encoding it.

        0 where the tokenizer's tokens do not stand for fixed bytes.
        """
        if self._num_bytes is None or self._content.get("normalizer"):
            return 0
        return len(text.encode("utf-8", "replace")) // int(self._num_bytes.max())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, control tokens by their names; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        plain = [int(token_id) for token_id in ids]
        for token_id in plain:
            if not 0 <= token_id < self.vocab_size:
                raise DataError(
                    f"token id {token_id} is not in the vocabulary of {self.vocab_size}",
                    hint="decode with the tokenizer that made the ids",
                )
        return self._codec.decode(plain)

    def count_bytes(self, ids: Iterable[int] | Ids) -> int:
        """UTF-8 bytes of the text that ids stand for; the end-of-text token counts 0."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        if self._num_bytes is not None:
            return int(self._num_bytes[array].sum())
        return len(self.decode(array[array != self.end_of_text_id].tolist()).encode())

    @functools.cached_property
    def _json_file(self) -> bytes:
        return (json.dumps(self._content, ensure_ascii=False) + "\n").encode()

    def files(self) -> dict[str, bytes]:
        """The files that Hugging Face's AutoTokenizer loads, by name."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._end_of_text,
            "eos_token": self._end_of_text,
            "unk_token": self._end_of_text,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        return {
            "tokenizer.json": self._json_file,
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }


def load_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer by name or path; never from the network.

    Args:
        spec: "gpt2", the path of a tokenizer.json, or of a folder that holds one.

    Raises:
        UsageError: there is nothing of that name.
        DataError: the file is not a tokenizer.json, or names no end-of-text token.
    """
    if spec == GPT2:
        return _gpt2()
    path = Path(spec)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"there is no tokenizer {spec!r}",
            hint="give gpt2, the path of a tokenizer.json, or of a folder that holds one",
        )
    data = _read_file(file)
    if data == _gpt2().files()["tokenizer.json"]:  # seen at once; the hash would take longer
        return _gpt2()
    content = _parse(data, file)
    name = file.resolve().parent.name if file.name == "tokenizer.json" else file.stem
    return Tokenizer(
        name=name,
        content=content,
        end_of_text=_find_end_of_text(content, file),
        beginning=_configured_token(file, "bos_token"),
    )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Trains a byte-level BPE tokenizer.

    Args:
        texts: what it learns its merges from; the same texts in the same order give the same
            bytes.
        vocab_size: ids in all: <|endoftext|> (id 0), 256 bytes, and as many merges as fit.

    Returns:
        The content of a tokenizer.json.

    Raises:
        UsageError: vocab_size is too small or too large.
        DataError: the texts are too few for so many tokens.
    """
    if not 257 <= vocab_size <= 1 << 20:
        raise UsageError(
            f"a vocabulary of {vocab_size} cannot be trained",
            hint="257 (every byte and the end-of-text token) to 1048576",
        )
    from tokenizers import Tokenizer as JsonTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = JsonTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((checked(text) for text in texts), trainer=trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the texts give a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size}",
            hint="ask for a smaller vocabulary, or train it on more text",
        )
    return (tokenizer.to_str() + "\n").encode()


@functools.cache
def _gpt2() -> Tokenizer:
    return Tokenizer(name=GPT2, content=gpt2_tokenizer_json(), end_of_text=END_OF_TEXT)


def checked(text: str) -> str:
    """The text, when it can be written as UTF-8.

    Raises:
        DataError: it holds a lone surrogate.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds a lone surrogate at character {error.start}",
                hint="a lone surrogate is half a character; mend the text or drop it",
            ) from error
    return text


_NOT_A_TOKENIZER = "give a tokenizer.json as Hugging Face's tokenizers writes it"


def _read_file(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise DataError(f"{file} is larger than any tokenizer.json", hint=_NOT_A_TOKENIZER)
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _parse(data: bytes, file: Path) -> dict[str, Any]:
    hint = _NOT_A_TOKENIZER
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not a tokenizer.json: {error}", hint=hint) from error
    vocab = content.get("model", {}).get("vocab") if isinstance(content, dict) else None
    if not isinstance(vocab, dict | list) or not vocab:
        raise DataError(f"{file} is not a tokenizer.json: it has no model.vocab", hint=hint)
    return content


def _all_tokens(content: dict[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id, added ones included."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score] by position
        tokens = {entry[0]: number for number, entry in enumerate(vocab)}
    else:
        tokens = dict(vocab)
    return tokens | {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}


def _control_ids(content: dict[str, Any]) -> dict[str, int]:
    """The control tokens of a tokenizer.json with their ids."""
    entries = content.get("added_tokens") or []
    return {entry["content"]: entry["id"] for entry in entries if entry.get("special")}


def _find_end_of_text(content: dict[str, Any], file: Path) -> str:
    """The token that ends a text, as the files beside say or by its usual names."""
    tokens = _all_tokens(content)
    for name in (_configured_token(file, "eos_token"), *END_OF_TEXT_NAMES):
        if name in tokens:
            return name
    raise DataError(
        f"{file} has no end-of-text token",
        hint=f"add one of {', '.join(END_OF_TEXT_NAMES)}, or name it as eos_token in "
        "tokenizer_config.json beside it",
    )


def _configured_token(file: Path, key: str) -> str:
    """What tokenizer_config.json beside a tokenizer.json names; empty where it does not."""
    config = file.with_name("tokenizer_config.json")
    if file.name != "tokenizer.json" or not config.is_file():
        return ""
    try:
        token = json.loads(config.read_bytes()).get(key)
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise DataError(f"{config} is not a JSON object: {error}") from error
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _with_control(content: dict[str, Any], token: str, token_id: int) -> dict[str, Any]:
    """The same tokenizer.json with `token` marked as a control token."""
    others = [e for e in content.get("added_tokens") or [] if e["content"] != token]
    return content | {"added_tokens": [*others, added_token(token, token_id)]}


def _bytes_of_ids(content: dict[str, Any], vocab_size: int) -> Ids | None:
    """UTF-8 bytes by id where every ordinary token stands for fixed bytes, else None."""
    decoder = content.get("decoder") or {}
    vocab = content["model"]["vocab"]
    if decoder.get("type") != "ByteLevel" or not isinstance(vocab, dict):
        return None
    table = np.zeros(vocab_size, dtype=np.int64)
    for token, number in vocab.items():
        data = bytes_of_token(token)
        table[number] = len(token.encode()) if data is None else len(data)
    for entry in content.get("added_tokens") or []:
        table[entry["id"]] = 0 if entry["special"] else len(entry["content"].encode())
    return table
