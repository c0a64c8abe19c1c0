"""What saving costs: how long training waits for a save, and what is left of its speed.

Three arms in turns, each a save and then the steps until the next one: `never` has no save,
`async` saves as training does, `sync` waits until the save is on the disk. The model has a
recipe's shape, its tokens are made up. One JSON row a result on stdout, talk on stderr.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from on_gpu.setting import (
    Setting,
    add_shared_arguments,
    new_model,
    new_optimizer,
    new_stepper,
    open_setting,
    show_row,
    tell,
    wait,
)

from milepost.checkpoint.state import Progress
from milepost.config.recipe import load_recipe
from milepost.core.console import say_error
from milepost.core.errors import MilepostError
from milepost.data.batch import Batch
from milepost.planner.cost import count_parameters
from milepost.planner.duration import estimate_duration, find_gpu
from milepost.runs.events import EventWriter, read_history
from milepost.runs.layout import RunLayout
from milepost.train.saving import CheckpointWriter, Saver

ARMS = ("never", "async", "sync")
PAPER = "dmas-1.7b"
BUS_BYTES_PER_SECOND = 25e9
"""Assumed of page-locked memory and a GPU: 80 % of what PCIe 4.0 x16 can do in one direction."""


class Bench:
    """One model in training, and a saver of it."""

    def __init__(self, setting: Setting, *, root: Path) -> None:
        config = setting.config
        self._setting = setting
        model = new_model(config, device=setting.device)
        optimizer = new_optimizer(model, config=config)
        self._stepper = new_stepper(
            model, optimizer=optimizer, config=config, world=setting.world, end_of_text_id=0
        )
        shape = (config.rows_per_step, config.data.sequence_length + 1)
        source = np.random.default_rng(1)
        self._batch = source.integers(0, config.model.vocab_size, shape, dtype=np.uint32)
        self.layout = RunLayout(root)
        writer = CheckpointWriter(
            layout=self.layout,
            run_id="benchmark",
            config=config.checkpoint,
            model_files={},
            events=EventWriter(self.layout.events, segment=1),
            good_step=0,
        )
        self.saver = Saver(writer, model=model, optimizer=optimizer, saved_step=0)
        self._num_saves = 0

    def step(self) -> None:
        """One update."""
        batch = Batch.of_tokens(self._batch)
        self._stepper.run_step(batch, learning_rate=1e-4, stop_requested=lambda: False)
        wait(self._setting.device)

    def turn(self, arm: str, *, steps: int) -> float:
        """Seconds from one save to the next, which would wait for this one."""
        started = time.perf_counter()
        if arm != "never":
            self._num_saves += 1
            self.saver.save(Progress(step=self._num_saves))
        if arm == "sync":
            self.saver.finish()
        for _ in range(steps):
            self.step()
        self.saver.finish()
        return time.perf_counter() - started


def measure(setting: Setting, *, steps: int, turns: int) -> None:
    """Runs the arms in turns and shows the rows."""
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    waited: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(dir=setting.folder, prefix="saves-") as root:
        bench = Bench(setting, root=Path(root))
        with bench.saver:
            for arm in ("never", "sync"):  # compiled, buffers touched, files made once
                bench.step()
                bench.turn(arm, steps=1)
            for number in range(turns):
                # Each turn begins with another arm, so that none is always the first.
                for arm in ARMS[number % 3 :] + ARMS[: number % 3]:
                    seconds[arm].append(bench.turn(arm, steps=steps))
                    history = read_history(bench.layout.events)
                    if arm != "never":
                        waited[arm].append(list(history.of_kind("checkpoint_saved"))[-1])
                    tell(f"turn {number + 1} of {turns}  {arm}: {seconds[arm][-1]:.2f} s")
    never = statistics.median(seconds["never"])
    tokens = steps * setting.config.train.global_batch_tokens
    for arm in ARMS:
        took = statistics.median(seconds[arm])
        row: dict[str, Any] = {
            "arm": arm,
            "steps_a_save": steps,
            "turns": turns,
            "tokens_per_second": tokens / took,
            "slower_fraction": 1 - never / took,
            "seconds": seconds[arm],
        }
        if saves := waited[arm]:
            row["copy_seconds"] = statistics.median(e["waited_seconds"] for e in saves)
            row["write_seconds"] = statistics.median(e["seconds"] for e in saves)
            row["checkpoint_bytes"] = saves[-1]["bytes"]
        show_row("checkpoint", setting=setting, **row)


def calculate(setting: Setting) -> None:
    """The share of the paper's training that its saves would take; nothing is measured."""
    config = load_recipe(PAPER, overrides=())
    duration = estimate_duration(config, gpu=find_gpu("h100"), num_gpus=1, tokens_per_second=None)
    assert duration is not None
    copy_seconds = 12 * count_parameters(config.model).total / BUS_BYTES_PER_SECOND
    every_tokens = config.checkpoint.every_steps * config.train.global_batch_tokens
    between_seconds = every_tokens / duration.tokens_per_second
    show_row(
        "checkpoint, calculated",
        setting=setting,
        of_recipe=PAPER,
        gpu="h100, one",
        assumed_mfu_fraction=duration.assumed_mfu_fraction,
        assumed_bus_bytes_per_second=BUS_BYTES_PER_SECOND,
        steps_a_save=config.checkpoint.every_steps,
        copy_seconds=copy_seconds,
        seconds_between_saves=between_seconds,
        waiting_fraction=copy_seconds / (between_seconds + copy_seconds),
    )


def main(words: list[str]) -> int:
    """Measures and calculates; returns the exit code."""
    parser = argparse.ArgumentParser(prog="checkpoint.py", description=__doc__)
    add_shared_arguments(parser, recipe="corpus-30m", steps=4)
    parser.add_argument("--turns", type=int, default=5, help="of each arm; default: 5")
    arguments = parser.parse_args(words)
    try:
        setting = open_setting(arguments)
        setting.folder.mkdir(parents=True, exist_ok=True)
        measure(setting, steps=arguments.steps, turns=arguments.turns)
        calculate(setting)
    except MilepostError as error:
        say_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
