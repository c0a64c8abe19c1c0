"""Kills `milepost train` at full size by SIGKILL, goes on, and compares the steps run again.

The update is an eighth of the paper's, so that twenty of them, two saves and two starts fit
into minutes; model, optimizer and checkpoint have their full size. Two train states lie on the
disk at once: `milepost plan` says how much that is.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from milepost.core.files import free_bytes
from milepost.experiments.segment_process import run_segment
from milepost.runs.events import Event, History, read_history
from milepost.runs.layout import RunLayout
from on_gpu.setting import Setting, open_setting, show_row, tell

QUESTION = "is a killed run continued to the last bit, and how long does a save take?"
RECIPE = "dmas-1.7b"
STEPS = 20
DEFAULTS = ("train.global_batch_tokens=65536", "checkpoint.keep_train_state=1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing besides the shared arguments."""


def answer(arguments: argparse.Namespace) -> int:
    """One row; exit code 1 where a step run again differs."""
    steps = arguments.steps
    own = (f"train.stop_at_step={steps}", f"checkpoint.every_steps={steps // 2}")
    setting = open_setting(arguments, defaults=(*DEFAULTS, *own))
    run = setting.folder / "run"
    setting.folder.mkdir(parents=True, exist_ok=True)
    tell(f"{run}: {free_bytes(setting.folder) / 1e9:.0f} GB are free")
    words = _words(setting, run=str(run))
    kill_at = steps * 3 // 4

    started = [time.time()]
    was_killed = run_segment(
        words, run=run, on_step=_say_step, kill_when=lambda event: event["step"] >= kill_at
    )
    started.append(time.time())
    run_segment(words, run=run, on_step=_say_step, kill_when=lambda event: False)
    ended = time.time()

    history = read_history(RunLayout(run).events)
    measured = _measure(history)
    show_row(
        "resume",
        setting=setting,
        was_killed=was_killed,
        segment_seconds=[started[1] - started[0], ended - started[1]],
        **measured,
    )
    return 0 if was_killed and measured["is_exact"] else 1


def _words(setting: Setting, *, run: str) -> list[str]:
    data = setting.open_data()
    place = ["--data.path", str(data.folder)]
    return ["train", setting.recipe, "--run", run, *setting.overrides, *place, "--ranks", "1"]


def _say_step(event: Event) -> None:
    tell(f"step {event['step']}: {event['tokens_per_second']:,.0f} tokens/s")


def _measure(history: History) -> dict[str, Any]:
    replayed = next(iter(history.of_kind("replayed")), None)
    saves = [e for e in history.of_kind("checkpoint_saved") if "seconds" in e]
    segments = list(history.of_kind("segment_started"))
    compared = 0 if replayed is None else replayed["compared"]
    equal = 0 if replayed is None else replayed["equal"]
    return {
        "is_exact": compared > 0 and compared == equal,
        "compared": compared,
        "equal": equal,
        "promised": [segment["exactness"] for segment in segments],
        "restored_steps": [segment["restored_step"] for segment in segments],
        "save_seconds": [event["seconds"] for event in saves],
        "save_bytes": [event["bytes"] for event in saves],
        "step_seconds": [event["step_seconds"] for event in history.of_kind("step")],
    }
