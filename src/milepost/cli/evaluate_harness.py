"""`milepost evaluate --harness`: tasks of lm-evaluation-harness itself on checkpoints."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from milepost.cli.evaluation_tables import aligned
from milepost.core import console
from milepost.distributed.decision import decide, main_rank_first
from milepost.distributed.world import World
from milepost.evaluation.checkpoints import (
    Checkpoint,
    checkpoint_from_plain,
    find_checkpoints,
    load_unverified,
    load_verified,
)
from milepost.evaluation.harness import run_harness
from milepost.evaluation.harness_files import write_harness_result
from milepost.evaluation.recording import COMPUTE_DTYPES


def evaluate_with_harness(
    model: Path,
    *,
    adapter: Path | None,
    tasks: Sequence[str],
    steps: str | None,
    limit: int | None,
    num_fewshot: int | None,
    dtype: str,
    include_path: Path | None,
    output_path: Path | None,
    log_samples: bool,
    as_json: bool,
    world: World,
    stop_requested: Callable[[], bool],
) -> bool:
    """Scores checkpoints on any of the harness's tasks and shows the result; every rank calls.

    Returns:
        True if a stop was asked for before all were scored.

    Raises:
        MilepostError: as `run_harness` and `find_checkpoints`.
    """
    plain = decide(
        lambda: [
            c.as_plain() for c in find_checkpoints(model, steps=steps, dtype=dtype, adapter=adapter)
        ],
        world=world,
    )
    results: list[dict[str, Any]] = []
    was_stopped = False
    for checkpoint in map(checkpoint_from_plain, plain):
        if was_stopped := decide(stop_requested, world=world):
            break
        result = _result(
            checkpoint,
            tasks=tasks,
            limit=limit,
            num_fewshot=num_fewshot,
            include_path=include_path,
            log_samples=log_samples,
            world=world,
        )
        samples = result.pop("samples", {})
        if world.is_main:
            if output_path is not None:
                now = datetime.datetime.now()
                write_harness_result(
                    result, samples, folder=output_path, model=checkpoint.folder, now=now
                )
            results.append({"step": checkpoint.weights.step} | result)
            if not as_json:
                _show(checkpoint, result)
    if world.is_main and as_json:
        console.show_json({"harness": results})
    return was_stopped


def _result(
    checkpoint: Checkpoint,
    *,
    tasks: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    log_samples: bool,
    world: World,
) -> dict[str, Any]:
    load = load_verified if world.is_main else load_unverified
    loaded = main_rank_first(lambda: load(checkpoint), world=world)
    return run_harness(
        loaded.model.to(world.device),
        loaded.tokenizer,
        tasks=tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        compute_dtype=COMPUTE_DTYPES[checkpoint.dtype],
        world=world,
        include_path=include_path,
        log_samples=log_samples,
    )


def _show(checkpoint: Checkpoint, result: dict[str, Any]) -> None:
    """A line a metric, under the model's folder."""
    rows: list[tuple[str, ...]] = [("task", "metric", "filter", "value", "")]
    for task, values in result["results"].items():
        for name, value in values.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            shown = f"{value:.4f} ± {error:.4f}" if isinstance(error, float) else f"{value:.4f}"
            rows.append((task, metric, filtered, shown, ""))
    for line in [f"{checkpoint.folder}, {checkpoint.dtype}", *aligned(rows), ""]:
        console.show(line)
