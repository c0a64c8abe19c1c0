"""GPT-2's byte alphabet and merge table, and what derives from them.

Only the merges are shipped (`gpt2/vocab.bpe`); ids, ranks and tokenizer.json follow from them:
the 256 bytes first, then one token a merge, then the end-of-text token.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

END_OF_TEXT = "<|endoftext|>"

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""How GPT-2 cuts text into pieces (Radford et al. 2019, encoder.py). Possessive, which changes
no match: no alternative needs a character back, except the space before a word."""

WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which is what that pattern means by \\s; Python's own \\s has four
control characters more."""


_BPE_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
"""What a tokenizer.json may ask of byte-pair encoding beyond what GPT-2 does."""


@functools.cache
def byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte, in the order of GPT-2's ids.

    Bytes that print as themselves in Latin-1 come first; the others take 256 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    symbols = {byte: chr(byte) for byte in printable}
    return symbols | {byte: chr(256 + position) for position, byte in enumerate(others)}


@functools.cache
def symbol_bytes() -> dict[str, int]:
    """The byte each printable character stands for."""
    return {symbol: byte for byte, symbol in byte_symbols().items()}


def bytes_of_token(token: str) -> bytes | None:
    """The bytes that a byte-level token stands for, None where it is not byte-level."""
    table = symbol_bytes()
    try:
        return bytes(table[symbol] for symbol in token)
    except KeyError:
        return None


@functools.cache
def gpt2_merges() -> tuple[tuple[str, str], ...]:
    """GPT-2's 50,000 merges, first to last."""
    file = importlib.resources.files("milepost.text") / "gpt2" / "vocab.bpe"
    lines = file.read_text(encoding="utf-8").split("\n")[1:]
    pairs = (line.split(" ") for line in lines if line)
    return tuple((left, right) for left, right in pairs)


@functools.cache
def gpt2_vocab() -> dict[str, int]:
    """GPT-2's 50,257 tokens with their ids."""
    tokens = [*byte_symbols().values(), *(left + right for left, right in gpt2_merges())]
    return {token: number for number, token in enumerate([*tokens, END_OF_TEXT])}


def gpt2_ranks() -> dict[bytes, int]:
    """The bytes of each ordinary token with its id, which is also its rank in merging."""
    table = symbol_bytes()
    return {
        bytes(table[symbol] for symbol in token): number
        for token, number in gpt2_vocab().items()
        if token != END_OF_TEXT
    }


def gpt2_tokenizer_json() -> dict[str, Any]:
    """GPT-2's tokenizer.json, made from the merges."""
    vocab = gpt2_vocab()
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [list(pair) for pair in gpt2_merges()],
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(END_OF_TEXT, vocab[END_OF_TEXT])],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": model,
    }


def is_gpt2_like(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is GPT-2's but for its merges, its ids and its control tokens."""
    model, cutter = content["model"], content.get("pre_tokenizer") or {}
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in _BPE_OPTIONS)
        and cutter.get("type") == "ByteLevel"
        and cutter.get("add_prefix_space") is False
        and cutter.get("use_regex", True) is True
        and not content.get("normalizer")
        and all(entry.get("special") for entry in content.get("added_tokens") or [])
    )


def added_token(content: str, token_id: int) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens: a control token, matched as it is."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
