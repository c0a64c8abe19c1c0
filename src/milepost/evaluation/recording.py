"""One task scored on one model, and its record: what `evaluate` and a training run share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from milepost.core.environment import code_version, cpu_name
from milepost.distributed.decision import decide
from milepost.distributed.reduce import gather_in_rank_order
from milepost.distributed.world import World
from milepost.evaluation.items import ItemResult
from milepost.evaluation.metrics import metric_values
from milepost.evaluation.tasks import Task, never_stop, tell_nobody
from milepost.model.llama import Llama
from milepost.runs.evaluations import Conditions, EvaluationRecord, EvaluationStore, Weights
from milepost.runs.events import utc_now
from milepost.text.tokenizer import Tokenizer

COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Scored:
    """What a scoring gave: the record's line, and the lines of its items file."""

    line: dict[str, Any]
    items: list[dict[str, Any]]


def conditions_of(task: Task, *, dtype: str) -> Conditions:
    """What of a task can change a score, beside the weights."""
    return Conditions(
        benchmark=task.benchmark,
        protocol=task.protocol,
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        data_sha256=task.data_sha256,
        dtype=dtype,
    )


@torch.no_grad()
def score(
    task: Task,
    model: Llama,
    *,
    tokenizer: Tokenizer,
    weights: Weights,
    dtype: str,
    store: EvaluationStore | None,
    world: World,
    stop_requested: Callable[[], bool] = never_stop,
    tell: Callable[[float], None] = tell_nobody,
) -> Scored | None:
    """Scores a task and records it; every rank must call, every rank gets the same.

    Args:
        task: opened for the model's tokenizer and context.
        model: not compiled.
        tokenizer: of the model.
        weights: what identifies the model.
        dtype: of the forward pass, a name of `COMPUTE_DTYPES`.
        store: where the main rank records it; None: nowhere.
        world: of this process.
        stop_requested: see `Task.score`, as `tell`.

    Returns:
        None where a stop was asked of any rank.

    Raises:
        DivergedError: the logits are not finite; nothing is recorded.
        StorageError: the record cannot be written.
    """
    if _is_asked_of_any_rank(stop_requested, world=world):
        return None
    started = time.monotonic()
    results = task.score(
        model,
        tokenizer=tokenizer,
        compute_dtype=COMPUTE_DTYPES[dtype],
        world=world,
        stop_requested=stop_requested,
        tell=tell,
    )
    if results is None:
        return None
    seconds = time.monotonic() - started
    items = [_item_line(result) for result in results]

    def record() -> dict[str, Any]:
        record = _record(task, results, weights, dtype=dtype, world=world, seconds=seconds)
        return record.as_line() if store is None else store.add(record, items)

    return Scored(decide(record, world=world), items)


def _is_asked_of_any_rank(stop_requested: Callable[[], bool], *, world: World) -> bool:
    flag = torch.tensor([float(stop_requested())], dtype=torch.float64, device=world.device)
    return bool(gather_in_rank_order(flag, world=world).any())


def _record(
    task: Task,
    results: Sequence[ItemResult],
    weights: Weights,
    *,
    dtype: str,
    world: World,
    seconds: float,
) -> EvaluationRecord:
    values = metric_values(results, task.metrics)
    return EvaluationRecord(
        weights=weights,
        conditions=conditions_of(task, dtype=dtype),
        n=len(results),
        metrics={name: {"value": v, "stderr": stderr} for name, (v, stderr) in values.items()},
        chance=task.chance,
        majority=task.majority,
        num_truncated=task.num_truncated,
        device=_device_name(world.device),
        ranks=world.size,
        seconds=seconds,
        milepost=code_version(),
        time=utc_now(),
    )


def _item_line(result: ItemResult) -> dict[str, Any]:
    line: dict[str, Any] = {
        "id": result.item_id,
        "gold": result.gold,
        "loglikelihoods": list(result.loglikelihoods),
        "chosen": result.chosen,
        "chosen_norm": result.chosen_norm,
    }
    return line | ({"extra": result.extra} if result.extra else {})


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
