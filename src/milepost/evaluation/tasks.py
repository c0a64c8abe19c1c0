"""What can be asked of a model, behind one face: name, what identifies it, and its score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from milepost.distributed.world import World
from milepost.evaluation.items import ItemResult
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer


def never_stop() -> bool:
    """The `stop_requested` of a scoring that nobody interrupts."""
    return False


def tell_nobody(done_fraction: float) -> None:
    """The `tell` of a scoring that nobody watches."""


class Task(Protocol):
    """A benchmark that is ready to be scored on any model of one tokenizer.

    Attributes:
        benchmark: its name.
        protocol: see `ItemSet`, as the next three.
        num_fewshot: solved items before each question.
        limit: the first so many items were taken; None: all.
        data_sha256: of the rows.
        metrics: names, such as ("acc", "acc_norm").
        num_truncated: choices whose context was cut from the left to fit the model.
        num_items: to be scored.
        chance: accuracy of guessing.
        majority: accuracy of always giving the commonest place among the choices.
    """

    @property
    def benchmark(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    @property
    def num_fewshot(self) -> int: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def data_sha256(self) -> str: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    @property
    def num_truncated(self) -> int: ...
    @property
    def num_items(self) -> int: ...
    @property
    def chance(self) -> float: ...
    @property
    def majority(self) -> float: ...

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
        """Scores every item, in order; every rank must call, every rank gets all results.

        Args:
            model: not compiled, so that training's compiled code never sees another shape.
            tokenizer: of the model.
            compute_dtype: of the forward pass.
            world: of this process.
            stop_requested: asked before each batch; if any rank says yes, the scoring is given
                up and every rank gets None.
            tell: hears now and then which fraction of this rank's share is done.

        Raises:
            DivergedError: the logits are not finite.
        """
