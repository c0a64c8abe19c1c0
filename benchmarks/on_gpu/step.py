"""Tokens a second, share of the peak and memory of one update, at several settings.

Each variant runs one update that compiles and is not counted, then `--steps` that are. The
allocator's peak stands beside what `milepost plan` says, without the plan's share for the
process itself, which the allocator does not see.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from functools import partial
from typing import Any

import torch

from milepost.config.schema import Config
from milepost.data.batch import Batch
from milepost.data.loader import Loader
from milepost.planner.memory import estimate_memory
from milepost.train.schedule import learning_rate
from milepost.train.step import Stepper
from on_gpu.setting import (
    Setting,
    new_model,
    new_optimizer,
    new_stepper,
    open_loader,
    open_setting,
    peak_share,
    show_row,
    tell,
    wait,
)

QUESTION = "speed and memory of a step: microbatches, recompute, determinism"
RECIPE = "dmas-1.7b"
STEPS = 5
DEFAULTS = ("train.global_batch_tokens=131072",)
"""A quarter of the paper's batch, so that a variant takes seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which variants."""
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--recompute", nargs="+", default=["none", "block"])
    parser.add_argument("--deterministic", nargs="+", default=["on", "off"])


def answer(arguments: argparse.Namespace) -> int:
    """One row a variant; a variant that does not fit the GPU has a row that says so."""
    setting = open_setting(arguments, defaults=DEFAULTS)
    data = setting.open_data()
    model = new_model(setting.config, device=setting.device)
    optimizer = new_optimizer(model, config=setting.config)
    with open_loader(setting, data=data) as loader:
        for config in _variants(setting, arguments):
            optimizer.zero_grad(set_to_none=True)
            _release(setting)
            stepper_of = partial(
                new_stepper,
                model,
                optimizer=optimizer,
                config=config,
                world=setting.world,
                end_of_text_id=data.end_of_text_id,
            )
            try:
                # The stepper and its buffers live as long as the call.
                measured = _measure(
                    stepper_of(), loader, config=config, steps=arguments.steps, setting=setting
                )
            except torch.OutOfMemoryError:
                measured = {"fits": False}
            show_row("step", setting=setting, **_describe(config), **measured)
    return 0


def _variants(setting: Setting, arguments: argparse.Namespace) -> list[Config]:
    """Every microbatch and recompute; determinism is switched at the recipe's own only."""
    found = []
    own = setting.config.train
    for deterministic, recompute, rows in itertools.product(
        arguments.deterministic, arguments.recompute, arguments.microbatches
    ):
        is_own = rows == own.microbatch_rows and recompute == own.recompute
        if deterministic == "off" and not is_own:
            continue
        config = setting.with_train(
            deterministic=deterministic == "on", recompute=recompute, microbatch_rows=rows
        )
        if config.rows_per_step % (rows * own.lanes):
            tell(f"microbatch {rows} does not divide a lane, left out")
            continue
        found.append(config)
    return found


def _describe(config: Config) -> dict[str, Any]:
    train = config.train
    planned = estimate_memory(config)
    return {
        "microbatch_rows": train.microbatch_rows,
        "recompute": train.recompute,
        "deterministic": train.deterministic,
        "precision": train.precision,
        "compile": train.compile,
        "tokens_per_step": train.global_batch_tokens,
        "planned_bytes": planned.total_bytes - planned.process_bytes,
    }


def _measure(
    stepper: Stepper, loader: Loader, *, config: Config, steps: int, setting: Setting
) -> dict[str, Any]:
    device = setting.device
    seconds, losses = [], []
    for step in range(steps + 1):
        batch = loader.batch(step)
        wait(device)
        started = time.perf_counter()
        result = stepper.run_step(
            Batch.of_tokens(batch),
            learning_rate=learning_rate(step, config=config),
            stop_requested=lambda: False,
        )
        wait(device)
        seconds.append(time.perf_counter() - started)
        losses.append(result.loss_nats)
        tell(f"update {step}: {seconds[-1]:.3f} s, loss {result.loss_nats:.4f}")
    median = statistics.median(seconds[1:])
    rate = config.train.global_batch_tokens / median
    measured: dict[str, Any] = {
        "fits": True,
        "first_step_seconds": seconds[0],
        "step_seconds": seconds[1:],
        "tokens_per_second": rate,
        "share_of_bf16_peak": peak_share(config, tokens_per_second=rate, device=device),
        "last_loss_nats": losses[-1],
    }
    if device.type == "cuda":
        measured["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        measured["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return measured


def _release(setting: Setting) -> None:
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
