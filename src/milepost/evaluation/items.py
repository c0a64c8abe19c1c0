"""What is asked of a model: items with choices, as token ids, and what identifies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One possible answer.

    Attributes:
        context_ids: tokens before the answer; at least one.
        target_ids: tokens whose log-likelihood is summed; at least one. Context and target
            together, without the last token, fit the model's context.
        num_characters: of the answer's own text, by which `acc_norm` divides.
    """

    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    num_characters: int


@dataclass(frozen=True)
class Item:
    """One question: its choices in the order of the benchmark, and which of them is true.

    Attributes:
        item_id: the row's own name, or its number where it has none; unique in the set.
        gold: index of the true choice.
    """

    item_id: str
    gold: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class ItemSet:
    """The items of one benchmark for one tokenizer and one context length.

    Attributes:
        benchmark: its name.
        protocol: how items become prompts and scores; changes whenever numbers could.
        num_fewshot: solved items before each question.
        limit: the first so many items were taken; None: all.
        data_sha256: of the rows that were read, whatever the limit.
        metrics: names, such as ("acc", "acc_norm").
        items: in the order of the rows.
        num_truncated: choices whose context was cut from the left to fit the model.
    """

    benchmark: str
    protocol: str
    num_fewshot: int
    limit: int | None
    data_sha256: str
    metrics: tuple[str, ...]
    items: tuple[Item, ...]
    num_truncated: int


@dataclass(frozen=True)
class ItemResult:
    """One item as a model answered it; a line of an items file.

    Attributes:
        loglikelihoods: of each choice, nats.
        chosen: the likeliest choice; of equals the first.
        chosen_norm: the likeliest by nats per character; of equals the first.
        extra: what only one protocol has, such as a rationale.
    """

    item_id: str
    gold: int
    loglikelihoods: tuple[float, ...]
    chosen: int
    chosen_norm: int
    extra: dict[str, Any]
