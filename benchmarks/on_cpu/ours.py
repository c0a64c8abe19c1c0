"""Milepost's own contenders: the product's step, and what accumulating gradients costs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from on_gpu.setting import new_model, new_optimizer, new_stepper

from milepost.config.recipe import config_from_plain
from milepost.config.schema import Config
from milepost.data.batch import Batch
from milepost.distributed.place import read_place
from milepost.distributed.world import World, join_world
from milepost.model.llama import Llama
from milepost.train.objective import build_objective
from milepost.train.step import Stepper
from on_cpu.work import Work, read_batches

_JOIN_SECONDS = 600.0


def milepost_turns(work: Work, *, folder: Path, stack: ExitStack) -> Callable[[int], float]:
    """Update -> mean nats, by the product's step; every rank must call.

    Args:
        work: the settings.
        folder: of the work.
        stack: leaves the world when it is closed.
    """
    config = config_from_plain(work.config, source="the work")
    place = read_place(os.environ)
    assert place is not None
    world = stack.enter_context(join_world(place, device_type="cpu", timeout_seconds=_JOIN_SECONDS))
    _, stepper = _model_and_stepper(config, world=world)
    batches = read_batches(folder)

    def turn(index: int) -> float:
        return _run(stepper, batches[index], learning_rate=work.learning_rates[index])

    return turn


def accumulation_turns(work: Work, *, folder: Path) -> Callable[[int], dict[str, Any]]:
    """Turn -> seconds of one update of all rows, and of its microbatches by themselves.

    A microbatch by itself is forward and backward without gradients that were there before; the
    update is of one lane, with lanes' sum, clipping and AdamW.
    """
    config = config_from_plain(work.config, source="the work")
    batches = read_batches(folder)
    num_microbatches = batches.shape[1] // work.microbatch_rows
    world = World(rank=0, size=1, device=torch.device("cpu"))
    one_lane = config.model_copy(update={"train": config.train.model_copy(update={"lanes": 1})})
    model, stepper = _model_and_stepper(one_lane, world=world)
    objective = build_objective(model, config=one_lane, end_of_text_id=0)

    def alone(batch: np.ndarray) -> None:
        for rows in np.split(batch.astype(np.int64), num_microbatches):
            model.zero_grad(set_to_none=True)
            ids = torch.from_numpy(rows)
            loss, _ = objective(ids[:, :-1], ids[:, 1:], 1 / ids[:, 1:].numel())
            loss.backward()

    def turn(index: int) -> dict[str, Any]:
        started, busy = time.perf_counter(), time.process_time()
        alone(batches[index])
        middle, busy_middle = time.perf_counter(), time.process_time()
        nats = _run(stepper, batches[index], learning_rate=work.learning_rates[index])
        ended, busy_ended = time.perf_counter(), time.process_time()
        return {
            "microbatches": num_microbatches,
            "loss_nats": nats,
            "alone_seconds": middle - started,
            "update_seconds": ended - middle,
            "alone_cpu_seconds": busy_middle - busy,
            "update_cpu_seconds": busy_ended - busy_middle,
        }

    return turn


def _model_and_stepper(config: Config, *, world: World) -> tuple[Llama, Stepper]:
    model = new_model(config, device=world.device)
    optimizer = new_optimizer(model, config=config)
    stepper = new_stepper(model, optimizer=optimizer, config=config, world=world, end_of_text_id=0)
    return model, stepper


def _run(stepper: Stepper, batch: np.ndarray, *, learning_rate: float) -> float:
    result = stepper.run_step(
        Batch.of_tokens(batch), learning_rate=learning_rate, stop_requested=lambda: False
    )
    return result.loss_nats
