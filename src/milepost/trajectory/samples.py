"""Completions of the same prompt, step by step, cut to what a page can hold."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Completion:
    """What the model wrote at one step.

    Attributes:
        num_cut_characters: left off at the end.
        repetition: how much it repeats itself, in words; a line each, none where nobody counted.
    """

    step: int
    text: str
    num_cut_characters: int
    repetition: tuple[str, ...]


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
    limit = min(MAX_COMPLETION_CHARACTERS, ALL_CHARACTERS // max(1, num_completions))
    groups = [
        SampleGroup(
            prompt=prompt if len(prompt) <= limit else prompt[:limit] + "…",
            decoding=decoding,
            completions=[
                _completion(step, *by_key[prompt, decoding][step], limit=limit)
                for step in spread[prompt, decoding]
            ],
            num_recorded=len(by_key[prompt, decoding]),
        )
        for prompt, decoding in shown
    ]
    return groups, len(keys) - len(shown)


def evenly_spread(steps: list[int]) -> list[int]:
    """At most `MAX_STEPS_SHOWN` of the steps, the first and the last among them."""
    if len(steps) <= MAX_STEPS_SHOWN:
        return steps
    last = len(steps) - 1
    places = {round(n * last / (MAX_STEPS_SHOWN - 1)) for n in range(MAX_STEPS_SHOWN)}
    return [steps[place] for place in sorted(places)]


def _completion(step: int, written: str, quality: Any, *, limit: int) -> Completion:
    # The first space or line end joins the completion to its prompt; runs of blank lines tell
    # nothing.
    calm = re.sub(r"\n{3,}", "\n\n", written.replace("\r\n", "\n").removeprefix(" "))
    calm = calm.lstrip("\n")
    num_cut = max(0, len(calm) - limit)
    return Completion(step, calm[:limit], num_cut, repetition=_repetition_in_words(quality))


def _repetition_in_words(quality: Any) -> tuple[str, ...]:
    values = quality if isinstance(quality, dict) else {}
    lines = []
    if (repeated := finite(values.get("repeated_4gram_fraction"))) is not None:
        lines.append(f"repeats {100 * repeated:.0f} %")
    if (distinct := finite(values.get("distinct_2"))) is not None:
        lines.append(f"distinct-2 {distinct:.2f}")
    return tuple(lines)


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
