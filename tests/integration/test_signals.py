"""Stops from outside: Ctrl-C, kill and a closed terminal, at any time of a run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import (
    command,
    environment,
    events,
    logged_steps,
    start,
    train_here,
    wait_for_step,
    weights_sha256,
    write_recipe,
)

ENDLESS = ("--train.total_steps", "100000")
RANKS = ("--ranks", "2")
STOPPING = "stopping: the step is finished and saved; Ctrl-C again leaves at once"

Stop = Callable[["subprocess.Popen[str]"], None]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def children_of(pid: int) -> list[int]:
    answer = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True
    )
    return [int(word) for word in answer.stdout.split()]


def wait_for_children(pid: int, *, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = children_of(pid)
        if len(children) >= count:
            return children
        time.sleep(0.02)
    raise AssertionError(f"process {pid} has not started {count} others in 30 s")


def ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def close_terminal(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGHUP)


def terminate_one_rank(process: subprocess.Popen[str]) -> None:
    os.kill(children_of(process.pid)[1], signal.SIGTERM)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 15
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.02)
            raise AssertionError(f"process {pid} is still there after 15 s")


@pytest.mark.parametrize(
    "stop", [ctrl_c, close_terminal, pytest.param(terminate_one_rank, marks=pytest.mark.long)]
)
def test_a_stop_saves_ends_with_75_and_the_run_goes_on_exactly(
    stop: Stop, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    process = start(recipe, run, tiny_data, *ENDLESS, *RANKS)
    wait_for_step(run, 3)
    stop(process)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 75, talk
    assert talk.count(STOPPING) == (0 if stop is terminate_one_rank else 1)
    assert "Traceback" not in talk
    ended = events(run, "segment_ended")[-1]
    assert ended["reason"] == "stop requested"
    assert (run / "checkpoints" / f"step-{ended['step']:08d}" / "train_state").is_dir()
    last = ended["step"] + 2
    for folder in (run, undisturbed):
        train_here(recipe, folder, tiny_data, *ENDLESS, "--train.stop_at_step", str(last))
    assert logged_steps(run) == logged_steps(undisturbed)
    assert weights_sha256(run, last) == weights_sha256(undisturbed, last)


def terminate(process: subprocess.Popen[str]) -> None:
    process.terminate()


@pytest.mark.parametrize(
    ("stop", "seconds"),
    [
        (terminate, 0.5),
        pytest.param(terminate, 0.0, marks=pytest.mark.long),
        pytest.param(ctrl_c, 0.0, marks=pytest.mark.long),
        pytest.param(ctrl_c, 1.0, marks=pytest.mark.long),
        pytest.param(close_terminal, 0.3, marks=pytest.mark.long),
    ],
)
def test_a_stop_while_the_ranks_start_is_not_lost(
    stop: Stop, seconds: float, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(recipe, run, tiny_data, *ENDLESS, "--ranks", "1")
    wait_for_children(process.pid, count=1)
    time.sleep(seconds)
    stop(process)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 75, talk
    assert STOPPING in talk
    assert max(logged_steps(run)) == 1
    assert (run / "checkpoints" / "step-00000001" / "train_state").is_dir()


def test_ctrl_c_twice_leaves_at_once(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path / "run", tiny_data, *ENDLESS, *RANKS)
    ranks = wait_for_children(process.pid, count=2)
    ctrl_c(process)
    time.sleep(0.2)
    pressed = time.monotonic()
    ctrl_c(process)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 130, talk
    assert time.monotonic() - pressed < 5
    assert "left at once" in talk
    wait_until_gone(ranks)


@pytest.mark.long
def test_ctrl_c_twice_beside_a_frozen_rank_does_no_harm_to_the_run(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(recipe, run, tiny_data, *ENDLESS, *RANKS)
    wait_for_step(run, 7)
    ranks = children_of(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    ctrl_c(process)
    time.sleep(0.2)
    ctrl_c(process)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 130, talk
    wait_until_gone(ranks)
    last = max(logged_steps(run)) + 1
    train_here(recipe, run, tiny_data, *ENDLESS, "--train.stop_at_step", str(last))
    assert events(run, "checkpoint_quarantined") == []
    assert sorted(logged_steps(run)) == list(range(1, last + 1))


@pytest.mark.long
def test_ctrl_c_while_blocks_are_compiled_waits_for_the_compiler(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = command(recipe, run, tiny_data, *ENDLESS, "--ranks", "1", "--train.compile", "true")
    process = subprocess.Popen(
        words,
        env=environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_compiler(process.pid)
    ctrl_c(process)
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 75, talk
    assert max(logged_steps(run)) == 1


def wait_for_compiler(session: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        answer = subprocess.run(
            ["ps", "-s", str(session), "-o", "comm="], capture_output=True, text=True
        )
        if "cc1plus" in answer.stdout:
            return
        time.sleep(0.01)
    raise AssertionError("no compiler was started in 120 s")


@pytest.mark.long
def test_a_stop_under_torchrun_ends_with_0_and_its_event(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # Without `--`, torchrun takes --run for a shortened --run-path of its own.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*torchrun, "--no-python", "--", *command(recipe, run, tiny_data, *ENDLESS)],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(run, 3)
    terminate_one_rank(process)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 0, talk
    assert events(run, "segment_ended")[-1]["reason"] == "stop requested"


SEGMENT = """
import sys
from pathlib import Path
from milepost.core.errors import StopRequested
from milepost.experiments.segment_process import run_segment
try:
    run_segment(sys.argv[2:], run=Path(sys.argv[1]), on_step=lambda event: None,
                kill_when=lambda event: False)
except StopRequested as stop:
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
    ("signum", "code", "reasons"),
    [
        pytest.param(signal.SIGTERM, 75, ["stop requested"], marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 75, ["stop requested"], marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 1, [], marks=pytest.mark.long),
        (signal.SIGKILL, -9, []),
    ],
)
def test_a_training_ends_with_the_process_that_watches_it(
    signum: int, code: int, reasons: list[str], recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = command(recipe, run, tiny_data, *ENDLESS, "--ranks", "1")[3:]
    demo = subprocess.Popen(
        [sys.executable, "-c", SEGMENT, str(run), *words],
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(run, 2)
    launcher = children_of(demo.pid)
    ranks = children_of(launcher[0])
    assert len(launcher) == len(ranks) == 1
    demo.send_signal(signum)
    demo.wait(20)
    wait_until_gone(launcher + ranks)
    assert demo.returncode in (code, -signum)
    assert [e["reason"] for e in events(run, "segment_ended")] == reasons
