"""The task that every benchmark of choices is: the likeliest continuation is the answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from milepost.distributed.world import World
from milepost.evaluation.items import ItemResult, ItemSet
from milepost.evaluation.metrics import chance, item_results, majority
from milepost.evaluation.scoring import score_items
from milepost.evaluation.tasks import never_stop, tell_nobody
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChoiceTask:
    """A `Task` made of items, scored by the log-likelihoods of their choices."""

    item_set: ItemSet

    @property
    def benchmark(self) -> str:
        """See `Task`, as the rest."""
        return self.item_set.benchmark

    @property
    def protocol(self) -> str:
        return self.item_set.protocol

    @property
    def num_fewshot(self) -> int:
        return self.item_set.num_fewshot

    @property
    def limit(self) -> int | None:
        return self.item_set.limit

    @property
    def data_sha256(self) -> str:
        return self.item_set.data_sha256

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.item_set.metrics

    @property
    def num_truncated(self) -> int:
        return self.item_set.num_truncated

    @property
    def num_items(self) -> int:
        return len(self.item_set.items)

    @functools.cached_property
    def chance(self) -> float:
        return chance(self.item_set.items)

    @functools.cached_property
    def majority(self) -> float:
        return majority(self.item_set.items)

    def score(
        self,
        model: Llama,
        *,
        tokenizer: Tokenizer,
        compute_dtype: torch.dtype,
        world: World,
        stop_requested: Callable[[], bool] = never_stop,
        tell: Callable[[float], None] = tell_nobody,
    ) -> list[ItemResult] | None:
        """See `Task.score`; the items are token ids already, the tokenizer is not used."""
        loglikelihoods = score_items(
            model,
            self.item_set.items,
            compute_dtype=compute_dtype,
            world=world,
            stop_requested=stop_requested,
            tell=tell,
        )
        if loglikelihoods is None:
            return None
        return item_results(self.item_set.items, loglikelihoods)
