"""Real training processes of a tiny model, for tests: start, kill, read back."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TINY_RECIPE = """
[data]
sequence_length = 32

[model]
vocab_size = 512
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64

[train]
global_batch_tokens = 256
microbatch_rows = 2
total_steps = 30
precision = "float32"
compile = false

[optimizer]
learning_rate = 3e-3

[schedule]
warmup_steps = 5

[checkpoint]
every_steps = 5

[validation]
every_steps = 10
tokens = 600
"""

COMPARED = ("loss_nats", "grad_norm", "learning_rate", "batch_sha256", "tokens_seen", "data_step")


def write_recipe(folder: Path, text: str = TINY_RECIPE) -> Path:
    """A recipe file of the tiny model."""
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def command(recipe: Path, run: Path, data: Path, *more: str) -> list[str]:
    """The command line of a training run."""
    base = [sys.executable, "-m", "milepost.cli.main", "train", str(recipe), "--run", str(run)]
    return [*base, "--data.path", str(data), *more]


def environment() -> dict[str, str]:
    """The environment of a user's shell, without what pytest or a launcher adds."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_CURRENT_TEST")
    return {k: v for k, v in os.environ.items() if k not in dropped}


def train(
    recipe: Path, run: Path, data: Path, *more: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs one segment to its end."""
    return subprocess.run(
        command(recipe, run, data, *more),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start(recipe: Path, run: Path, data: Path, *more: str) -> subprocess.Popen[str]:
    """Starts a segment in a process group of its own."""
    process = subprocess.Popen(
        command(recipe, run, data, *more),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


_started: list[subprocess.Popen[str]] = []


def kill_started() -> None:
    """Ends every process group of `start` that is still there."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and all its ranks at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for_step(run: Path, step: int, *, timeout: float = 60) -> None:
    """Returns as soon as the history holds a step at least as late."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if any(e["step"] >= step for e in events(run, "step")):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Whole events of one kind, in file order."""
    path = run / "events.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["kind"] == kind:
            found.append(event)
    return found


def logged_steps(run: Path) -> dict[int, tuple[Any, ...]]:
    """Step to its numbers, floats as hex; the later entry of a step counts."""
    found = {}
    for event in events(run, "step"):
        values = (event[name] for name in COMPARED)
        found[event["step"]] = tuple(v.hex() if isinstance(v, float) else v for v in values)
    return found


def weights_sha256(run: Path, step: int) -> str:
    """Hash of a checkpoint's model file and optimizer file."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    digest.update((folder / "train_state" / "optimizer.safetensors").read_bytes())
    return digest.hexdigest()


def train_here(recipe: Path, run: Path, data: Path, *overrides: str, override: bool = False) -> Any:
    """One segment on one rank inside this process: no start-up time, no kill."""
    from milepost.config.recipe import load_recipe
    from milepost.distributed.place import Place
    from milepost.train.rank import train_as_rank

    config = load_recipe(str(recipe), overrides=("--data.path", str(data), *overrides))
    place = Place(rank=0, size=1, local_rank=0, started_by="milepost")
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        return train_as_rank(
            place, config=config, recipe=str(recipe), run=run, may_override=override
        )
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
