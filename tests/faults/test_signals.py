"""Rows 4, 5 and 34: asked to stop, left at once, and nobody there to listen, in every phase."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import (
    Course,
    children_of,
    environment,
    events,
    kill_group,
    logged_steps,
    wait_for_children,
    wait_for_step,
    wait_until_gone,
)

STOPPING = "stopping: the step is finished and saved; Ctrl-C again leaves at once"

Stop = Callable[["subprocess.Popen[str]"], None]


def ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def close_terminal(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGHUP)


def terminate(process: subprocess.Popen[str]) -> None:
    process.terminate()


def terminate_all(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)


def terminate_one_rank(process: subprocess.Popen[str]) -> None:
    os.kill(children_of(process.pid)[1], signal.SIGTERM)


def check_stop(process: subprocess.Popen[str], run: Path) -> str:
    """That the run is saved at the step it stopped at; gives what was said."""
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 75, talk
    assert "Traceback" not in talk
    ended = events(run, "segment_ended")[-1]
    assert ended["reason"] == "stop requested"
    assert ended["step"] == max(logged_steps(run))
    assert events(run, "checkpoint_saved")[-1]["step"] == ended["step"]
    return talk


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        ("shipped", terminate),
        ("plain", ctrl_c),
        pytest.param("plain", close_terminal, marks=pytest.mark.long),
        pytest.param("plain", terminate_all, marks=pytest.mark.long),
        pytest.param("shipped", terminate_one_rank, marks=pytest.mark.long),
    ],
)
def test_a_stop_between_saves_is_saved_and_the_run_goes_on_exactly(
    kind: str, stop: Stop, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    course: Course = request.getfixturevalue(kind)
    run = tmp_path / "run"
    process = course.start(run, "--ranks", "2")
    wait_for_step(run, 3)
    asked = time.monotonic()
    stop(process)
    talk = check_stop(process, run)
    assert time.monotonic() - asked < 30, "10 where nothing else runs"
    assert talk.count(STOPPING) == (0 if stop is terminate_one_rank else 1)
    course.finish(run)
    assert events(run, "replayed") == [], "nothing was lost, so nothing is run again"


@pytest.mark.parametrize(
    ("stop", "seconds"),
    [
        (terminate_all, 0.5),
        pytest.param(terminate, 0.0, marks=pytest.mark.long),
        pytest.param(ctrl_c, 0.0, marks=pytest.mark.long),
        pytest.param(ctrl_c, 1.0, marks=pytest.mark.long),
        pytest.param(close_terminal, 0.3, marks=pytest.mark.long),
    ],
)
def test_a_stop_while_the_ranks_start_is_not_lost(
    stop: Stop, seconds: float, plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = plain.start(run, "--ranks", "1")
    wait_for_children(process.pid, count=1)
    time.sleep(seconds)
    stop(process)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 75, talk
    assert STOPPING in talk and "Traceback" not in talk
    assert not logged_steps(run), "asked before the first step"
    plain.finish(run)


@pytest.mark.long
@pytest.mark.parametrize("stop", [ctrl_c, terminate_all])
def test_a_stop_while_blocks_are_compiled_waits_for_the_compiler(
    stop: Stop, shipped: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        shipped.command(run, "--ranks", "1"),
        env=environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_compiler(process.pid)
    stop(process)
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 75, talk
    assert max(logged_steps(run)) == 1
    shipped.finish(run)


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


def test_a_stop_while_it_scores_the_validation_set_does_not_wait_for_the_score(
    plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    often = ("--validation.every_steps", "1", "--validation.tokens", "100000")
    process = plain.start(run, "--ranks", "2", *often)
    wait_for_step(run, 3)
    terminate(process)  # nine tenths of the time between two steps go to the validation
    check_stop(process, run)
    assert len(events(run, "validation")) <= max(logged_steps(run)), "the last was given up"
    plain.train_here(run, "--validation.tokens", "100000")
    assert logged_steps(run) == logged_steps(plain.undisturbed)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.long
@pytest.mark.parametrize("stop", [terminate_all, ctrl_c])
def test_a_stop_in_the_middle_of_a_save_waits_for_it(
    stop: Stop, plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start_with_slow_saves(plain, run)
    wait_for_save(run)
    # To the launcher and its rank; the tracer would let go of them.
    for pid in launcher_and_ranks(process):
        os.kill(pid, signal.SIGINT if stop is ctrl_c else signal.SIGTERM)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 75, talk
    saved = [event["step"] for event in events(run, "checkpoint_saved")]
    assert saved[0] == 10
    assert saved[-1] == events(run, "segment_ended")[-1]["step"]
    plain.finish(run)


def start_with_slow_saves(course: Course, run: Path) -> subprocess.Popen[str]:
    """On one rank; what a save forces to the disk takes half a second a file."""
    slow = ("-e", "trace=fsync", "-e", "inject=fsync:delay_enter=500000")
    return subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", *slow, *course.command(run, "--ranks", "1")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_save(run: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if list(run.glob("checkpoints/.saving-*/train_state/manifest.json")):
            return
        time.sleep(0.01)
    raise AssertionError("no save has begun in 60 s")


def launcher_and_ranks(process: subprocess.Popen[str]) -> list[int]:
    (launcher,) = children_of(process.pid)
    return [launcher, *children_of(launcher)]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.long
def test_ctrl_c_twice_in_the_middle_of_a_save_leaves_no_torn_checkpoint(
    plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start_with_slow_saves(plain, run)
    wait_for_save(run)
    everyone = launcher_and_ranks(process)
    for _ in range(2):
        os.kill(everyone[0], signal.SIGINT)
        time.sleep(0.2)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 130, talk
    wait_until_gone(everyone)
    plain.finish(run)
    assert events(run, "checkpoint_quarantined") == []


@pytest.mark.parametrize(
    "frozen", [False, pytest.param(True, marks=pytest.mark.long)], ids=["", "beside a frozen rank"]
)
def test_ctrl_c_twice_leaves_at_once_and_does_no_harm(
    frozen: bool, plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = plain.start(run, "--ranks", "2", "--validation.every_steps", "1")
    wait_for_step(run, 12)
    ranks = wait_for_children(process.pid, count=2)
    os.kill(ranks[1], signal.SIGSTOP)  # so that the first Ctrl-C is not answered before the second
    ctrl_c(process)
    if not frozen:
        os.kill(ranks[1], signal.SIGCONT)
    time.sleep(0.2 if frozen else 0.0)
    pressed = time.monotonic()
    ctrl_c(process)
    _, talk = process.communicate(timeout=30)
    if not frozen and process.returncode == 75:
        return  # the first was quicker, and everything is saved
    assert process.returncode == 130, talk
    assert time.monotonic() - pressed < 5
    assert "left at once" in talk
    wait_until_gone(ranks)
    plain.finish(run)
    assert events(run, "checkpoint_quarantined") == []


def test_nobody_at_the_other_end_of_its_output_does_not_end_a_run(
    plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = plain.start(run, "--ranks", "2")
    assert process.stderr is not None
    assert process.stderr.readline()
    process.stderr.close()
    assert process.wait(60) == 0
    plain.check(run)


@pytest.mark.long
def test_closed_output_and_a_hangup_that_is_ignored_do_not_end_a_run(
    plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = plain.command(run, "--ranks", "2")
    process = subprocess.Popen(
        ["sh", "-c", 'exec nohup "$@" >&- 2>&- <&-', "sh", *words],
        env=environment(),
        start_new_session=True,
    )
    try:
        wait_for_step(run, 3)
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            kill_group(process)
    plain.check(run)
