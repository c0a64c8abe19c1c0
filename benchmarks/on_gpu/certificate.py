"""Trains at full size to a checkpoint, then does as `milepost verify --replay`.

Model, optimizer and checkpoint have their full size; the update is a sixteenth of the paper's, so
that twenty of them and their replay fit into minutes. By default all steps are replayed from the
first one: then two train states lie on the disk at once, the run's and the replay's.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from milepost.core.files import free_bytes
from milepost.experiments.replay import replay
from milepost.experiments.segment_process import run_segment
from milepost.runs.events import Event
from on_gpu.setting import open_setting, show_row, tell

QUESTION = "does training again from a checkpoint give the same bits?"
RECIPE = "dmas-1.7b"
STEPS = 20
DEFAULTS = ("train.global_batch_tokens=32768",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where."""
    parser.add_argument(
        "--from-checkpoint",
        action="store_true",
        help="replay the second half, from a checkpoint in the middle (a third train state)",
    )
    parser.add_argument("--ranks", type=int, default=1, help="default: 1")


def answer(arguments: argparse.Namespace) -> int:
    """One row, the certificate in it; exit code 1 where a bit differs."""
    steps = arguments.steps
    every = steps // 2 if arguments.from_checkpoint else steps
    own = (f"train.stop_at_step={steps}", f"checkpoint.every_steps={every}")
    setting = open_setting(arguments, defaults=(*DEFAULTS, *own))
    run = setting.folder / "run"
    setting.folder.mkdir(parents=True, exist_ok=True)
    tell(f"{run}: {free_bytes(setting.folder) / 1e9:.0f} GB are free")
    data = setting.open_data()
    words = ["train", setting.recipe, "--run", str(run), *setting.overrides]
    words += ["--data.path", str(data.folder), "--ranks", str(arguments.ranks)]
    started = time.perf_counter()
    run_segment(words, run=run, on_step=_say_step, kill_when=lambda event: False)
    trained = time.perf_counter() - started
    certificate, _ = replay(
        run,
        from_step=None if arguments.from_checkpoint else 0,
        ranks=arguments.ranks,
        command=shlex.join(sys.argv),
    )
    tell(certificate.as_text())
    show_row(
        "certificate",
        setting=setting,
        is_equal=certificate.is_equal,
        training_seconds=trained,
        certificate=certificate.as_plain(),
    )
    return 0 if certificate.is_equal else 1


def _say_step(event: Event) -> None:
    tell(f"step {event['step']}: {event['tokens_per_second']:,.0f} tokens/s")
