"""Real training processes of a tiny model, for tests: start, kill, read back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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

SHIPPED = ("--train.precision", "bfloat16", "--train.compile", "true")
"""What the packaged recipes come to on this machine; the tiny recipe itself is quicker to start."""

SHORT = ("--train.total_steps", "12", "--checkpoint.every_steps", "3")
"""Checkpoints of 3, 6, 9 and 12, the last two with a train state."""

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
    return start_words(command(recipe, run, data, *more))


def start_words(words: list[str]) -> subprocess.Popen[str]:
    """Starts a command line in a process group of its own."""
    process = subprocess.Popen(
        words,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


_started: list[subprocess.Popen[str]] = []


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that are there now."""
    answer = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True
    )
    return [int(word) for word in answer.stdout.split()]


def wait_for_children(pid: int, *, count: int) -> list[int]:
    """As `children_of`, as soon as there are so many."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = children_of(pid)
        if len(children) >= count:
            return children
        time.sleep(0.02)
    raise AssertionError(f"process {pid} has not started {count} others in 30 s")


def wait_until_gone(pids: Sequence[int], *, timeout: float = 15) -> None:
    """Returns when none of the processes is there any more."""
    deadline = time.monotonic() + timeout
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.02)
            raise AssertionError(f"process {pid} is still there after {timeout} s")


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


@dataclass(frozen=True)
class Course:
    """A training with its settings, and the run of it that nothing happened to.

    Attributes:
        words: the settings, as on the command line.
        undisturbed: a run folder, at the last step.
    """

    recipe: Path
    data: Path
    words: tuple[str, ...]
    undisturbed: Path

    @property
    def last_step(self) -> int:
        """Where the undisturbed run ended."""
        return max(logged_steps(self.undisturbed))

    def command(self, run: Path, *more: str) -> list[str]:
        """The command line of a segment."""
        return command(self.recipe, run, self.data, *self.words, *more)

    def start(self, run: Path, *more: str) -> subprocess.Popen[str]:
        """Starts a segment, to be disturbed."""
        return start(self.recipe, run, self.data, *self.words, *more)

    def train(self, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Runs a segment to its end."""
        return train(self.recipe, run, self.data, *self.words, *more)

    def train_here(self, run: Path, *more: str) -> Any:
        """Runs a segment in this process."""
        return train_here(self.recipe, run, self.data, *self.words, *more)

    def finish(self, run: Path) -> None:
        """Goes on to the last step on one rank, and holds the run against the undisturbed one."""
        self.train_here(run)
        self.check(run)

    def check(self, run: Path) -> None:
        """That every number of every step, the weights and the moments are the undisturbed run's,
        that no step is missing and that what was run again was the same each time.
        """
        steps, expected = logged_steps(run), logged_steps(self.undisturbed)
        assert sorted(steps) == list(range(1, self.last_step + 1))
        assert [step for step in steps if steps[step] != expected[step]] == []
        assert validations(run).items() >= validations(self.undisturbed).items()
        last = self.last_step
        assert weights_sha256(run, last) == weights_sha256(self.undisturbed, last)
        for replayed in events(run, "replayed"):
            assert replayed["equal"] == replayed["compared"] > 0
        names = [path.name for path in (run / "checkpoints").iterdir()]
        assert [name for name in names if not name.startswith("step-")] == [], "litter"


def validations(run: Path) -> dict[int, str]:
    """Step to its validation loss, as hex."""
    return {event["step"]: event["loss_nats"].hex() for event in events(run, "validation")}


def wait_for_step(run: Path, step: int, *, timeout: float = 180) -> None:
    """Returns as soon as the history holds a step at least as late."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if any(e["step"] >= step for e in events(run, "step")):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Whole events of these kinds, in file order."""
    path = run / "events.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["kind"] in kinds:
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


def trained_sha256(run: Path, step: int) -> str:
    """As `weights_sha256`, of a fine-tuning's checkpoint: a whole model or an adapter."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = [*folder.glob("*model.safetensors"), folder / "train_state" / "optimizer.safetensors"]
    assert len(files) == 2
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def left_beside(run: Path) -> list[str]:
    """Names of what replays have left beside a run."""
    return [path.name for path in run.parent.iterdir() if "replay" in path.name]


def train_here(
    recipe: Path,
    run: Path,
    data: Path,
    *overrides: str,
    override: bool = False,
    begin_with: Any = None,
) -> Any:
    """One segment on one rank inside this process: no start-up time, no kill."""
    from milepost.config.recipe import load_recipe
    from milepost.distributed.place import Place
    from milepost.train.rank import train_as_rank

    if "torch._dynamo" in sys.modules:  # a real segment finds nothing compiled in its process
        sys.modules["torch._dynamo"].reset()
    config = load_recipe(str(recipe), overrides=("--data.path", str(data), *overrides))
    place = Place(rank=0, size=1, local_rank=0, started_by="milepost")
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    handlers = {s: signal.getsignal(s) for s in stops}
    try:
        return train_as_rank(
            place,
            config=config,
            recipe=str(recipe),
            run=run,
            may_override=override,
            begin_with=begin_with,
        )
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
