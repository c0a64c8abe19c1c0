"""One contender of `peers`, alone in its process: the same updates on the same batches.

Each gets the recipe's weights, batches, microbatch, learning rates, clipping and AdamW. For
transformers everything is set in its favor: fused AdamW, autocast, SDPA, nothing deterministic,
and the loss inside the compiled function.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from plain_update import Update, nats_of_logits, plain_update

from milepost.data.batch import Batch
from milepost.train.precision import DTYPES
from milepost.train.schedule import learning_rate
from on_gpu.parity import oracle_of
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

QUESTION = "one contender of `peers`, alone"
RECIPE = "dmas-1.7b"
STEPS = 5
DEFAULTS = ("train.global_batch_tokens=131072",)
NAMES = ("milepost", "milepost-not-deterministic", "transformers-compiled", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which one."""
    parser.add_argument("--name", choices=NAMES, default=NAMES[0])


def answer(arguments: argparse.Namespace) -> int:
    """One row."""
    setting = open_setting(arguments, defaults=DEFAULTS)
    data = setting.open_data()
    make = _ours if arguments.name.startswith("milepost") else _transformers
    update = make(setting, arguments.name, data.end_of_text_id)
    seconds, losses = [], []
    with open_loader(setting, data=data) as loader:
        for step in range(arguments.steps + 1):
            batch = loader.batch(step)
            wait(setting.device)
            started = time.perf_counter()
            losses.append(update(batch, learning_rate(step, config=setting.config)))
            wait(setting.device)
            seconds.append(time.perf_counter() - started)
            tell(f"{arguments.name}: update {step}: {seconds[-1]:.3f} s, loss {losses[-1]:.4f}")
    rate = setting.config.train.global_batch_tokens / statistics.median(seconds[1:])
    on_gpu = setting.device.type == "cuda"
    show_row(
        "contender",
        setting=setting,
        name=arguments.name,
        microbatch_rows=setting.config.train.microbatch_rows,
        precision=setting.config.train.precision,
        first_step_seconds=seconds[0],
        step_seconds=seconds[1:],
        tokens_per_second=rate,
        share_of_bf16_peak=peak_share(
            setting.config, tokens_per_second=rate, device=setting.device
        ),
        peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        losses_nats=losses,
    )
    return 0


def _ours(setting: Setting, name: str, end_of_text_id: int) -> Update:
    is_deterministic = name == "milepost"
    config = setting.with_train(deterministic=is_deterministic)
    model = new_model(config, device=setting.device)
    stepper = new_stepper(
        model,
        optimizer=new_optimizer(model, config=config),
        config=config,
        world=setting.world,
        end_of_text_id=end_of_text_id,
    )

    def update(batch: np.ndarray, rate: float) -> float:
        result = stepper.run_step(
            Batch.of_tokens(batch), learning_rate=rate, stop_requested=lambda: False
        )
        return result.loss_nats

    return update


def _transformers(setting: Setting, name: str, end_of_text_id: int) -> Update:
    config, device = setting.config, setting.device
    model = oracle_of(new_model(config, device=device), end_of_text_id=end_of_text_id)
    model.train()
    optimizer = new_optimizer(model, config=config)  # type: ignore[arg-type]
    dtype = DTYPES[config.train.precision]

    summed_nats = nats_of_logits(
        lambda ids: model(ids, use_cache=False).logits, device=device, dtype=dtype
    )
    if name == "transformers-compiled":
        summed_nats = torch.compile(summed_nats, dynamic=False)
    return plain_update(
        summed_nats,
        model=model,
        optimizer=optimizer,
        microbatch_rows=config.train.microbatch_rows,
        clip_grad_norm=config.optimizer.clip_grad_norm,
    )
