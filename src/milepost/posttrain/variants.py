"""A prompt and its variants: the built-in small changes, or those of a file. No torch here."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.errors import DataError, UsageError
from milepost.core.files import storage_errors
from milepost.text.chat_template import DEFAULT_SYSTEM, Message, render

DEFAULT_QUESTION = "Who invented the first practical light bulb?"
"""The first question of the paper's Table V."""

OTHER_SYSTEM = "You answer every question in one short sentence."

BASE = "base"
MOST_VARIANTS = 256
MOST_FILE_BYTES = 16 << 20

_END_MARKS = ".?!"


@dataclass(frozen=True)
class Variant:
    """One way to put a prompt.

    Attributes:
        name: a word or two; no two variants of a probe share one.
        prompt: the whole text, after which the model goes on.
    """

    name: str
    prompt: str


def variants_of_question(question: str) -> list[Variant]:
    """The question in the chat template and small changes of it; the first is the base.

    A change that gives a text that was there before is left out.
    """
    question = question.strip()  # as the template does
    base = _chat(question)
    mark, marked = _other_end(question, mark="?")
    return _distinct(
        Variant(BASE, base),
        Variant("space", base + " "),
        Variant("newline", base + "\n"),
        Variant("no system", _chat(question, system="")),
        Variant("other system", _chat(question, system=OTHER_SYSTEM)),
        # As the paper prints the template in section IV.
        Variant("line breaks", f"{DEFAULT_SYSTEM}\n\nUSER: {question}\n\nASSISTANT:"),
        Variant("lower case", _chat(question.lower())),
        Variant("upper case", _chat(question.upper())),
        Variant(mark, _chat(marked)),
    )


def variants_of_prompt(prompt: str) -> list[Variant]:
    """A text as it is and small changes of it; otherwise as `variants_of_question`."""
    mark, marked = _other_end(prompt, mark=".")
    return _distinct(
        Variant(BASE, prompt),
        Variant("space", prompt + " "),
        Variant("newline", prompt + "\n"),
        Variant("trimmed", prompt.strip()),
        Variant("lower case", prompt.lower()),
        Variant("upper case", prompt.upper()),
        Variant(mark, marked),
    )


def read_variants(path: Path) -> list[Variant]:
    """The variants of a file, in its order.

    Args:
        path: .txt, a prompt a line, blanks at its end included; or .jsonl, an object a line with
            `prompt` (a text as it is) or `question` (for the chat template, with `system` if
            wanted), and `name` if wanted. Lines without a name are called "line 7"; empty lines
            are passed over.

    Raises:
        UsageError: there is no such file, or its ending is another.
        DataError: a line cannot be read, two have one name or one prompt, or there are none or
            too many.
        StorageError: the file cannot be read.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            f"variants are read from .txt and .jsonl, not from {path.name}",
            hint="in a .txt file each line is a prompt",
        )
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint="give a .txt or .jsonl file")
    lines = [(n, line) for n, line in enumerate(_lines(path), start=1) if line]
    if not 1 <= len(lines) <= MOST_VARIANTS:
        raise DataError(
            f"{path} has {len(lines):,} variants", hint=f"1 to {MOST_VARIANTS} can be probed"
        )
    read = _prompt_in_json if path.suffix == ".jsonl" else _prompt_in_text
    variants = [read(line, place=f"{path}:{n}", name=f"line {n}") for n, line in lines]
    return checked(variants, source=str(path))


def checked(variants: list[Variant], *, source: str) -> list[Variant]:
    """The variants themselves, if each has a name and a prompt of its own.

    Raises:
        DataError: two of them share one.
    """
    by_name: dict[str, Variant] = {}
    by_prompt: dict[str, Variant] = {}
    for variant in variants:
        if variant.name in by_name:
            raise DataError(
                f"{source} has two variants named {variant.name!r}", hint="rename one of them"
            )
        if (same := by_prompt.get(variant.prompt)) is not None:
            raise DataError(
                f"{source}: the variants {same.name!r} and {variant.name!r} are the same prompt",
                hint="leave one of them out",
            )
        by_name[variant.name] = by_prompt[variant.prompt] = variant
    return variants


def _chat(question: str, *, system: str = DEFAULT_SYSTEM) -> str:
    messages = [Message("system", system), Message("user", question)]
    return render(messages, add_generation_prompt=True)


def _other_end(text: str, *, mark: str) -> tuple[str, str]:
    """(name, text): without its last mark, or with `mark` where it has none."""
    if text.endswith(tuple(_END_MARKS)):
        return "no mark", text.rstrip(_END_MARKS)
    return "end mark", text + mark


def _distinct(*variants: Variant) -> list[Variant]:
    by_prompt: dict[str, Variant] = {}
    for variant in variants:
        by_prompt.setdefault(variant.prompt, variant)
    return list(by_prompt.values())


def _lines(path: Path) -> Iterable[str]:
    """Lines by line feed alone, as a prompt may hold what else Python takes for a line's end.

    A byte order mark, which some editors put before a text, is no part of it.
    """
    with storage_errors(path, verb="read"):
        with path.open("rb") as file:
            data = file.read(MOST_FILE_BYTES + 1)
    if len(data) > MOST_FILE_BYTES:
        raise DataError(f"{path} is larger than {MOST_FILE_BYTES} bytes", hint="split it")
    data = data.removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            yield line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number} is not UTF-8: {error.reason}") from error


def _prompt_in_text(line: str, *, place: str, name: str) -> Variant:
    return Variant(name, line)


_JSON_FORM = 'an object such as {"name": "a space", "prompt": "ASSISTANT: "} stands on each line'
_KEYS = ("name", "prompt", "question", "system")


def _prompt_in_json(line: str, *, place: str, name: str) -> Variant:
    row = _object_of_texts(line, place=place)
    if ("prompt" in row) == ("question" in row):
        raise DataError(f"{place} has not one of prompt and question", hint=_JSON_FORM)
    if "system" in row and "prompt" in row:
        raise DataError(
            f"{place} has a system sentence beside a prompt",
            hint="system goes with question; a prompt is a whole text",
        )
    name = row.get("name", name)
    if not name.strip():
        raise DataError(f"{place} has an empty name", hint="leave name out, or give a word or two")
    if "prompt" in row:
        return Variant(name, row["prompt"])
    try:
        prompt = _chat(row["question"], system=row.get("system", DEFAULT_SYSTEM))
    except DataError as error:
        raise DataError(f"{place}: {error.message}", hint=error.hint) from error
    return Variant(name, prompt)


def _object_of_texts(line: str, *, place: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}", hint=_JSON_FORM) from error
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise DataError(f"{place} is not an object of texts", hint=_JSON_FORM)
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds a lone surrogate, half a character", hint="mend the text or drop it"
        ) from error
    unknown = [key for key in row if key not in _KEYS]
    if unknown:
        raise DataError(
            f"{place} has the unknown key {unknown[0]!r}", hint=f"keys: {', '.join(_KEYS)}"
        )
    return row
