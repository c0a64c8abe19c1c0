"""Trains llama-124m for so many minutes with the product's own `train`, then stops and saves.

With `--folder` kept, the same command goes on where it stopped. Give `--data` a folder of real
text; made-up words only show the speed.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import threading
from typing import Any

from milepost.config.recipe import load_recipe
from milepost.distributed.place import Place
from milepost.runs.events import History, read_history
from milepost.runs.layout import RunLayout
from milepost.train.rank import train_as_rank
from on_gpu.setting import open_setting, peak_share, show_row

QUESTION = "what does llama-124m learn in so many minutes?"
RECIPE = "llama-124m"
STEPS = 9536
CURVE_STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long."""
    parser.add_argument("--minutes", type=float, default=8.0, help="default: 8")


def answer(arguments: argparse.Namespace) -> int:
    """One row: both ends of the loss curve, tokens a second, validation where there is one."""
    own = (f"train.stop_at_step={arguments.steps}", "checkpoint.every_steps=500")
    setting = open_setting(arguments, defaults=own)
    run = setting.folder / "run"
    data = setting.open_data()
    overrides = (*setting.overrides, "--data.path", str(data.folder))
    config = load_recipe(setting.recipe, overrides=overrides)
    # What a person's Ctrl-C or a scheduler's SIGTERM does: the step ends, the run is saved.
    clock = threading.Timer(arguments.minutes * 60, os.kill, (os.getpid(), signal.SIGTERM))
    clock.daemon = True
    clock.start()
    place = Place(rank=0, size=1, local_rank=0, started_by="milepost")
    try:
        summary = train_as_rank(
            place, config=config, recipe=setting.recipe, run=run, may_override=False
        )
    finally:
        clock.cancel()
    history = read_history(RunLayout(run).events)
    measured = _measure(history)
    rate = measured["tokens_per_second"]
    share = peak_share(setting.config, tokens_per_second=rate, device=setting.device)
    show_row(
        "llama-124m",
        setting=setting,
        minutes=arguments.minutes,
        summary=summary,
        share_of_bf16_peak=share,
        **measured,
    )
    return 0


def _measure(history: History) -> dict[str, Any]:
    steps = list(history.latest_by_step("step").values())
    first, last = steps[:CURVE_STEPS], steps[-CURVE_STEPS:]
    return {
        "num_steps": len(steps),
        "first_losses_nats": [event["loss_nats"] for event in first],
        "last_losses_nats": [event["loss_nats"] for event in last],
        "mean_of_last_losses_nats": statistics.mean(event["loss_nats"] for event in last),
        "tokens_seen": steps[-1]["tokens_seen"],
        "tokens_per_second": statistics.median(event["tokens_per_second"] for event in steps[1:]),
        "validation": [
            {name: event[name] for name in ("step", "loss_nats", "bits_per_byte")}
            for event in history.of_kind("validation")
        ],
    }
