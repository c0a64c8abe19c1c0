"""Tokens a second, share of the peak and memory of one update, at several settings.

Each variant runs one update that compiles and is not counted, then `--steps` that are. The
allocator's peak stands beside what `milepost plan` says, without the plan's share for the
process itself, which the allocator does not see.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from functools import partial
from typing import Any

import torch

from milepost.config.schema import Config
from milepost.train.pretraining import RunningText
from on_gpu.measured_steps import measure_steps, planned_bytes
from on_gpu.setting import (
    Setting,
    new_model,
    new_optimizer,
    new_stepper,
    open_loader,
    open_setting,
    show_row,
    tell,
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
    parser.add_argument(
        "--optimizers", nargs="+", default=["adamw"], help="such as: adamw adamw8bit"
    )


def answer(arguments: argparse.Namespace) -> int:
    """One row a variant; a variant that does not fit the GPU has a row that says so."""
    setting = open_setting(arguments, defaults=DEFAULTS)
    data = setting.open_data()
    model = new_model(setting.config, device=setting.device)
    optimizer: torch.optim.Optimizer | None = None
    name = None
    with open_loader(setting, data=data) as loader:
        for config in _variants(setting, arguments):
            model.zero_grad(set_to_none=True)
            if name != config.optimizer.name:
                name, optimizer = config.optimizer.name, None  # one optimizer's moments at a time
                optimizer = new_optimizer(model, config=config)
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
                measured = measure_steps(
                    stepper_of(),
                    RunningText(loader),
                    config=config,
                    steps=arguments.steps,
                    setting=setting,
                )
            except torch.OutOfMemoryError:
                measured = {"fits": False}
            planned, peak = planned_bytes(config), measured.get("peak_allocated_bytes")
            show_row(
                "step",
                setting=setting,
                **_describe(config),
                planned_bytes=planned,
                planned_to_peak=None if peak is None else planned / peak,
                **measured,
            )
    return 0


def _variants(setting: Setting, arguments: argparse.Namespace) -> list[Config]:
    """Every microbatch and recompute; the rest is switched at the recipe's own of these only."""
    found = []
    own = setting.config.train
    for optimizer, deterministic, recompute, rows in itertools.product(
        arguments.optimizers,
        arguments.deterministic,
        [int(word) if word.isdigit() else word for word in arguments.recompute],
        arguments.microbatches,
    ):
        is_own = rows == own.microbatch_rows and recompute == own.recompute
        if not is_own and (deterministic == "off" or optimizer != arguments.optimizers[0]):
            continue
        config = setting.with_train(
            deterministic=deterministic == "on", recompute=recompute, microbatch_rows=rows
        )
        if config.rows_per_step % (rows * own.lanes):
            tell(f"microbatch {rows} does not divide a lane, left out")
            continue
        section = config.optimizer.model_copy(update={"name": optimizer})
        found.append(config.model_copy(update={"optimizer": section}))
    return found


def _describe(config: Config) -> dict[str, Any]:
    train = config.train
    return {
        "microbatch_rows": train.microbatch_rows,
        "recompute": train.recompute,
        "deterministic": train.deterministic,
        "precision": train.precision,
        "compile": train.compile,
        "float8": train.float8,
        "optimizer": config.optimizer.name,
        "tokens_per_step": train.global_batch_tokens,
    }


def _release(setting: Setting) -> None:
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
