"""Completions of the same prompt, step by step, cut to what a page can hold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.trajectory.fields import finite, text, whole

MAX_STEPS_SHOWN = 24
MAX_GROUPS_SHOWN = 20
MAX_COMPLETION_CHARACTERS = 2000
ALL_CHARACTERS = 150_000
"""Of all completions on the page together, so that it stays small."""

MAX_WORDS_COMPARED = 200
"""Of a completion; the time of a comparison grows with their square."""

MIN_SHARED_FRACTION = 0.25
"""Of words. Below it a completion counts as written anew, and nothing in it is marked."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a completion.

    Attributes:
        is_new: whether the completion shown before does not have it.
    """

    text: str
    is_new: bool


@dataclass(frozen=True)
class Completion:
    """What the model wrote at one step.

    Attributes:
        num_cut_characters: left off at the end.
        repetition: how much it repeats itself, in words; a line each, none where nobody counted.
        pieces: the text in order, with what is new against the completion shown before.
        change: how many words are new, in words; empty for the first.
    """

    step: int
    text: str
    num_cut_characters: int
    repetition: tuple[str, ...]
    pieces: tuple[Piece, ...]
    change: str


@dataclass(frozen=True)
class SampleGroup:
    """One prompt with one way of decoding, over the steps.

    Attributes:
        decoding: the settings in words.
        num_recorded: steps on record; the page shows evenly spread ones.
    """

    prompt: str
    decoding: str
    completions: list[Completion]
    num_recorded: int


def sample_groups(
    records: Iterable[dict[str, Any]], *, prompts: Sequence[str]
) -> tuple[list[SampleGroup], int]:
    """The groups to show, and how many more there are.

    Args:
        records: lines of samples.jsonl in file order.
        prompts: the run's own, which come first.
    """
    by_key: dict[tuple[str, str], dict[int, tuple[str, Any]]] = {}
    for record in records:
        step, prompt = whole(record.get("step")), text(record.get("prompt"))
        completion = text(record.get("completion"))
        if step is None or prompt is None or completion is None:
            continue
        of_prompt = by_key.setdefault((prompt, _decoding_in_words(record)), {})
        of_prompt[step] = (completion, record.get("quality"))
    place = {prompt: number for number, prompt in enumerate(prompts)}
    # A stable sort: prompts that are not the run's own stay in the order they were recorded.
    keys = sorted(by_key, key=lambda key: place.get(key[0], len(place)))
    shown = keys[:MAX_GROUPS_SHOWN]
    spread = {key: evenly_spread(sorted(by_key[key])) for key in shown}
    num_completions = sum(map(len, spread.values()))
    limit = shown_characters(num_completions)
    groups = [
        SampleGroup(
            prompt=prompt if len(prompt) <= limit else prompt[:limit] + "…",
            decoding=decoding,
            completions=_completions(
                by_key[prompt, decoding], steps=spread[prompt, decoding], limit=limit
            ),
            num_recorded=len(by_key[prompt, decoding]),
        )
        for prompt, decoding in shown
    ]
    return groups, len(keys) - len(shown)


def shown_characters(num_texts: int) -> int:
    """How much of each text the page shows, so that all together stay small."""
    return min(MAX_COMPLETION_CHARACTERS, ALL_CHARACTERS // max(1, num_texts))


def calmed(completion: str) -> str:
    """The text without what joins it to its prompt, and without runs of blank lines."""
    # The first space or line end joins the completion to its prompt; blank lines tell nothing.
    calm = re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", completion.replace("\r\n", "\n").removeprefix(" "))
    return calm.lstrip("\n")


def evenly_spread(steps: list[int]) -> list[int]:
    """At most `MAX_STEPS_SHOWN` of the steps, the first and the last among them."""
    if len(steps) <= MAX_STEPS_SHOWN:
        return steps
    last = len(steps) - 1
    places = {round(n * last / (MAX_STEPS_SHOWN - 1)) for n in range(MAX_STEPS_SHOWN)}
    return [steps[place] for place in sorted(places)]


def _completions(
    written: dict[int, tuple[str, Any]], *, steps: Sequence[int], limit: int
) -> list[Completion]:
    completions: list[Completion] = []
    for step in steps:
        completion, quality = written[step]
        calm = calmed(completion)
        shown = calm[:limit]
        pieces, change = marked(shown, before=completions[-1].text if completions else None)
        num_cut, repetition = max(0, len(calm) - limit), _repetition_in_words(quality)
        completions.append(Completion(step, shown, num_cut, repetition, pieces, change))
    return completions


def marked(text: str, *, before: str | None) -> tuple[tuple[Piece, ...], str]:
    """The text with the words marked that `before` does not have there, and how many they are.

    Only the first `MAX_WORDS_COMPARED` words of each are compared; the rest is never marked.

    Args:
        text: to mark.
        before: None: nothing is marked.
    """
    whole_text = (Piece(text, is_new=False),)
    # Each word keeps the white space around it, so that the pieces join to the text.
    spaced = re.findall(r"\s*\S+\s*", text)
    words = [word.strip() for word in spaced[:MAX_WORDS_COMPARED]]
    if text == before:
        return whole_text, "the same as before"
    if before is None or not words:
        return whole_text, ""
    old = before.split()[:MAX_WORDS_COMPARED]
    blocks = difflib.SequenceMatcher(a=old, b=words, autojunk=False).get_matching_blocks()
    num_shared = sum(block.size for block in blocks)
    if num_shared < MIN_SHARED_FRACTION * len(words):
        return whole_text, "written anew"
    which = "of" if len(words) == len(spaced) else "of the first"
    pieces = _pieces(spaced, shared=[(block.b, block.b + block.size) for block in blocks])
    return pieces, f"{len(words) - num_shared} {which} {len(words)} words new"


def _pieces(spaced: list[str], *, shared: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
    """The words joined again, in turn new and shared; what follows the last range is not new."""
    pieces, place = [], 0
    for first, end in shared:
        new = "".join(spaced[place:first])
        bare = new.rstrip()
        pieces.append(Piece(bare, is_new=True))
        pieces.append(Piece(new[len(bare) :] + "".join(spaced[first:end]), is_new=False))
        place = end
    pieces.append(Piece("".join(spaced[place:]), is_new=False))
    return tuple(piece for piece in pieces if piece.text)


def repeats_in_words(quality: Any) -> str:
    """How much of a text stood before in it; empty where nobody counted or it is too short."""
    values = quality if isinstance(quality, dict) else {}
    repeated = finite(values.get("repeated_4gram_fraction"))
    return "" if repeated is None else f"repeats {100 * repeated:.0f} %"


def _repetition_in_words(quality: Any) -> tuple[str, ...]:
    values = quality if isinstance(quality, dict) else {}
    distinct = finite(values.get("distinct_2"))
    lines = (repeats_in_words(quality), "" if distinct is None else f"distinct-2 {distinct:.2f}")
    return tuple(line for line in lines if line)


def _decoding_in_words(record: dict[str, Any]) -> str:
    decoding = record.get("decoding")
    settings = decoding if isinstance(decoding, dict) else {}
    temperature = finite(settings.get("temperature"))
    parts = []
    if temperature is None:
        parts.append("temperature unknown")
    elif temperature == 0:
        parts.append("greedy")
    else:
        parts.append(f"temperature {temperature:g}")
    for name, words in (("top_k", "top {:g}"), ("top_p", "top p {:g}")):
        value = finite(settings.get(name))
        if value is not None and temperature != 0:
            parts.append(words.format(value))
    if temperature != 0 and (seed := whole(record.get("seed"))) is not None:
        parts.append(f"seed {seed}")
    length = whole(settings.get("max_new_tokens"))
    if length is not None:
        parts.append(f"at most {length:,} tokens")
    if adapter := text(record.get("adapter")):
        parts.append(f"adapter {adapter[:12]}")
    return ", ".join(parts)
