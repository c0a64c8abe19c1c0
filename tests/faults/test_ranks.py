"""Rows 21, 22 and 23: a rank is killed, freezes or fails, under our launcher and under torchrun."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sabotage import Sabotage
from tests.training import (
    Course,
    children_of,
    environment,
    events,
    logged_steps,
    wait_for_children,
    wait_for_step,
    wait_until_gone,
)


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("plain", 1), ("shipped", 0), pytest.param("plain", 0, marks=pytest.mark.long)],
)
def test_a_killed_rank_takes_the_other_down_is_named_and_the_run_goes_on_exactly(
    kind: str, rank: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    course: Course = request.getfixturevalue(kind)
    run = tmp_path / "run"
    process = course.start(run, "--ranks", "2")
    wait_for_step(run, 23)
    ranks = children_of(process.pid)
    os.kill(ranks[rank], signal.SIGKILL)
    died = time.monotonic()
    _, talk = process.communicate(timeout=30)
    assert time.monotonic() - died < 15
    assert process.returncode == 1
    assert talk.endswith(
        f"error: rank {rank} was ended by SIGKILL\n"
        "hint: run the same command again; it goes on from the newest checkpoint\n"
    )
    assert f"error: rank {1 - rank} lost the other ranks" in talk
    assert "Traceback" not in talk
    wait_until_gone(ranks)
    course.finish(run)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_frozen_rank_ends_the_run_after_the_timeout_and_the_run_goes_on_exactly(
    rank: int, plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    short = ("--guards.collective_timeout_seconds", "5")
    process = plain.start(run, "--ranks", "2", *short)
    wait_for_step(run, 23)
    ranks = children_of(process.pid)
    os.kill(ranks[rank], signal.SIGSTOP)
    _, talk = process.communicate(timeout=5 + 30)
    assert process.returncode == 1
    assert f"error: rank {1 - rank} waited 5.0 s for another rank in a " in talk
    assert "guards.collective_timeout_seconds" in talk
    assert f"rank {1 - rank} stood here:\n" in talk
    assert "\n  train/loop.py:" in talk, "from where it waited"
    assert f"rank {rank} stands here, the newest call first:\n" in talk
    assert 'train/loop.py", line ' in talk, "where the frozen one stood"
    assert "Traceback" not in talk
    wait_until_gone(ranks)
    plain.finish(run)


def test_a_rank_that_is_frozen_for_less_than_the_timeout_goes_on(
    plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = plain.start(run, "--ranks", "2", "--guards.collective_timeout_seconds", "60")
    wait_for_step(run, 23)
    frozen = children_of(process.pid)[1]
    os.kill(frozen, signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(frozen, signal.SIGCONT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 0, talk
    plain.check(run)


FREEZE_BEFORE_JOINING = """
module.JOIN_SECONDS = 3
really = module._meet
def meet(place):
    if place.rank == FROZEN:
        os.kill(os.getpid(), signal.SIGSTOP)
    return really(place)
module._meet = meet
"""


@pytest.mark.parametrize("frozen", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_that_never_joins_is_given_up_in_words(
    frozen: int, plain: Course, tmp_path: Path, sabotage: Sabotage
) -> None:
    run = tmp_path / "run"
    body = FREEZE_BEFORE_JOINING.replace("FROZEN", str(frozen))
    sabotage.patch("milepost.distributed.world", body)
    process = plain.start(run, "--ranks", "2")
    ranks = wait_for_children(process.pid, count=2)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: rank {1 - frozen} waited for another rank to join, in vain\n" in talk
    assert "Traceback" not in talk
    wait_until_gone(ranks)
    sabotage.remove()
    plain.finish(run)


def test_a_rank_that_fails_says_why_itself_and_the_other_points_to_it(
    plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = plain.start(run, "--ranks", "2")
    wait_for_step(run, 23)
    ranks = children_of(process.pid)
    # The history is the main rank's: no file of its own may grow from here on.
    size = (run / "events.jsonl").stat().st_size
    resource.prlimit(ranks[0], resource.RLIMIT_FSIZE, (size, size))
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 7, talk
    reason = talk.index(f"error: cannot write {run}")
    assert "error: " not in talk[:reason], "the reason comes first"
    assert talk.count("error: rank 1 lost the other ranks") <= 1
    assert "Traceback" not in talk
    wait_until_gone(ranks)
    plain.finish(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optimizer.weight_decay", "0.2"), "the recipe differs from the run's"),
        pytest.param(
            ("--samples.every_steps", "5", "--samples.prompts", '["long ' + "word " * 200 + '"]'),
            "samples.prompts: ",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_the_main_rank_refuses_is_said_once_and_the_other_leaves_in_silence(
    words: tuple[str, ...], message: str, short: Course, half: Path
) -> None:
    done = short.train(half, "--ranks", "2", *words)
    assert done.returncode == 2, done.stderr
    assert f"error: {message}" in done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr


def torchrun(course: Course, run: Path, *, max_restarts: int) -> subprocess.Popen[str]:
    # Without `--`, torchrun takes --run for a shortened --run-path of its own.
    words = ["--nproc-per-node", "2", "--max-restarts", str(max_restarts), "--no-python", "--"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, *course.command(run)],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    """What was said by a torchrun that ends by itself; a test that fails leaves none behind."""
    try:
        _, talk = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return talk


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_torchrun_with_restarts_goes_on_exactly_after_a_rank_was_killed(
    rank: int, plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = torchrun(plain, run, max_restarts=1)
    wait_for_step(run, 23)
    os.kill(children_of(process.pid)[rank], signal.SIGKILL)
    talk = end(process)
    assert process.returncode == 0, talk
    assert len(events(run, "segment_started")) == 2
    plain.check(run)


@pytest.mark.long
def test_a_survivor_that_torchrun_ends_saves_nothing_on_its_way_out(
    plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = torchrun(plain, run, max_restarts=0)
    wait_for_step(run, 23)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    talk = end(process)
    assert process.returncode == 1, talk
    saved = [event["step"] for event in events(run, "checkpoint_saved")]
    due = list(range(10, max(logged_steps(run)) + 1, 10))
    # The last save may have been under way: it is written beside the steps after it.
    assert saved in (due, due[:-1]), "no save out of turn"
    plain.finish(run)


@pytest.mark.long
def test_a_stop_under_torchrun_ends_with_0_and_its_event(plain: Course, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun(plain, run, max_restarts=0)
    wait_for_step(run, 3)
    os.kill(children_of(process.pid)[1], signal.SIGTERM)
    talk = end(process)
    assert process.returncode == 0, talk
    assert events(run, "segment_ended")[-1]["reason"] == "stop requested"
    plain.finish(run)
