"""A byte-level BPE tokenizer as GGUF's metadata, for llama.cpp and what is built on it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from milepost.core.errors import UsageError
from milepost.text.tokenizer import Tokenizer

PRE_TOKENIZER = "gpt-2"
"""llama.cpp's name of GPT-2's way to cut text into pieces."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens (gguf.TokenType)."""

_GENERATION_MARKER = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class GgufTokenizer:
    """What GGUF holds of a tokenizer.

    Attributes:
        tokens: by id, in GPT-2's printable characters; as many as the model has rows.
        types: of the tokens.
        merges: "left right", first to last.
        beginning_id: stands before a text.
        end_of_text_id: ends it.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    beginning_id: int
    end_of_text_id: int


def gguf_tokenizer(tokenizer: Tokenizer, *, vocab_size: int) -> GgufTokenizer:
    """What GGUF is told of a tokenizer.

    Args:
        tokenizer: byte-level BPE that cuts text as GPT-2 does, as `milepost data prepare` trains.
        vocab_size: of the model; ids above the tokenizer's are marked as unused.

    Raises:
        UsageError: it is of another kind.
    """
    content = json.loads(tokenizer.files()["tokenizer.json"])
    _refuse_other_kinds(content)
    tokens = [f"[unused {number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for entry in content.get("added_tokens") or []:
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    types[tokenizer.end_of_text_id] = CONTROL
    merges = content["model"]["merges"]
    return GgufTokenizer(
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        beginning_id=tokenizer.beginning_id,
        end_of_text_id=tokenizer.end_of_text_id,
    )


def _refuse_other_kinds(content: dict[str, Any]) -> None:
    model, cut = content["model"], content.get("pre_tokenizer") or {}
    expected = {
        "model.type": (model.get("type"), "BPE"),
        "model.byte_fallback": (bool(model.get("byte_fallback")), False),
        "model.ignore_merges": (bool(model.get("ignore_merges")), False),
        "normalizer": (content.get("normalizer"), None),
        "pre_tokenizer.type": (cut.get("type"), "ByteLevel"),
        "pre_tokenizer.use_regex": (cut.get("use_regex", True), True),
        "pre_tokenizer.add_prefix_space": (cut.get("add_prefix_space"), False),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise UsageError(
                f"the tokenizer cannot be written as GGUF: its {name} is {found!r}, "
                f"only {wanted!r} is known",
                hint="export it with --format hf, and convert that with llama.cpp's "
                "convert_hf_to_gguf.py",
            )


def plain_template(jinja: str) -> str:
    """A chat template without its {% generation %} markers, which not every reader knows.

    A comment stands in for each: it keeps what the marker did to the white space beside it.
    """
    return _GENERATION_MARKER.sub(lambda match: f"{{#{match[1]} {match[2]}#}}", jinja)
