"""Milepost and transformers on the same work, in turns, each in a process of its own.

The rounds are interleaved, so that a GPU that slows down slows everyone; the best median of a
contender's rounds counts. The ratio is to the fastest peer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from milepost.core.errors import MilepostError
from on_gpu.contender import DEFAULTS, NAMES
from on_gpu.setting import Setting, open_setting, show_row

QUESTION = "how fast is transformers at the same work?"
RECIPE = "dmas-1.7b"
STEPS = 5
PROGRAM = Path(__file__).resolve().parents[1] / "gpu.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Who, and how often."""
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=NAMES,
        default=["milepost", "transformers-compiled"],
    )


def answer(arguments: argparse.Namespace) -> int:
    """A row a contender and round, then one with the ratios."""
    setting = open_setting(arguments, defaults=DEFAULTS)
    data = setting.open_data()
    best: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name in arguments.contenders:
            row = _run(name, setting, data=data.folder, arguments=arguments)
            print(json.dumps(row), flush=True)
            best[name] = max(best.get(name, 0.0), row["tokens_per_second"])
            losses[name] = row["losses_nats"]
    peers = [rate for name, rate in best.items() if name.startswith("transformers")]
    ratios = {name: rate / max(peers) for name, rate in best.items()} if peers else {}
    show_row(
        "peers",
        setting=setting,
        tokens_per_second=best,
        ratio_to_fastest_peer=ratios,
        last_losses_nats={name: values[-1] for name, values in losses.items()},
    )
    return 0


def _run(
    name: str, setting: Setting, *, data: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    words = ["contender", "--name", name, "--recipe", arguments.recipe, "--data", str(data)]
    words += ["--steps", str(arguments.steps), "--folder", str(setting.folder)]
    for override in arguments.override:
        words += ["--override", override]
    if arguments.allow_cpu:
        words.append("--allow-cpu")
    result = subprocess.run([sys.executable, str(PROGRAM), *words], stdout=subprocess.PIPE)
    if result.returncode != 0:
        raise MilepostError(f"{name} ended with exit code {result.returncode}")
    row: dict[str, Any] = json.loads(result.stdout)
    return row
