"""Rows 19, 20 and 26: clocks that jump, two trainers in a folder, a run that is done."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.training import (
    Course,
    environment,
    events,
    kill_group,
    wait_for_step,
    weights_sha256,
)

needs_faketime = pytest.mark.skipif(
    shutil.which("faketime") is None, reason="faketime is not installed"
)


def train_at(course: Course, run: Path, when: str, *more: str) -> None:
    """A segment whose clock, that of the files too, is off."""
    words = ["faketime", "-f", when, *course.command(run, "--ranks", "1", *more)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@needs_faketime
@pytest.mark.parametrize("jump", ["-1y", pytest.param("+1y", marks=pytest.mark.long)])
def test_clocks_that_jump_between_segments_change_no_number(
    jump: str, plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    plain.train_here(run, "--train.stop_at_step", "15")
    train_at(plain, run, jump, "--train.stop_at_step", "25")
    plain.finish(run)
    years = {event["time"][:4] for event in events(run, "step")}
    assert len(years) == 2
    restored = [event["restored_step"] for event in events(run, "segment_started")]
    assert restored == [None, 15, 25], "the newest by step, whatever the clock said"
    assert all(event["training_seconds"] < 60 for event in events(run, "segment_ended"))


@needs_faketime
@pytest.mark.long
@pytest.mark.parametrize("jump", ["+1y", "-1y"])
def test_a_clock_that_jumps_in_the_middle_of_a_segment_changes_no_number(
    jump: str, plain: Course, tmp_path: Path
) -> None:
    run, clock = tmp_path / "run", tmp_path / "clock"
    clock.write_text("+0")
    library = next(Path("/usr/lib").rglob("faketime/libfaketimeMT.so.1"))
    faked = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    # A rank without the launcher, whose short sleeps this library refuses now and then.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    process = subprocess.Popen(
        plain.command(run),
        env=environment() | faked | alone,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_step(run, 15)
    clock.write_text(jump)
    _, talk = process.communicate(timeout=240)  # the library slows every look at a clock
    assert process.returncode == 0, talk
    plain.check(run)
    assert len({event["time"][:4] for event in events(run, "step")}) == 2
    assert all(0 <= event["step_seconds"] < 60 for event in events(run, "step"))


def test_a_second_trainer_is_refused_and_a_dead_one_s_lock_is_free(
    plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = ("--train.total_steps", "100000")
    first = plain.start(run, "--ranks", "1", *endless)
    wait_for_step(run, 1)
    second = plain.train(run, "--ranks", "2", *endless)
    assert second.returncode == 6, second.stderr
    assert second.stderr.count("is in use by process") == 1
    assert "Traceback" not in second.stderr
    holder = int(second.stderr.split("by process ")[1].split()[0])
    os.kill(holder, 0)
    kill_group(first)
    assert str(holder) in (run / ".lock").read_text()
    plain.train_here(run, *endless, "--train.stop_at_step", "1")


def test_a_folder_that_is_copied_while_it_is_trained_in_goes_on_by_itself(
    plain: Course, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    process = plain.start(run, "--ranks", "1")
    wait_for_step(run, 35)
    subprocess.run(
        ["cp", "-r", str(run), str(copy)], capture_output=True
    )  # some files go meanwhile
    plain.finish(copy)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 0, talk
    plain.check(run)


def test_a_finished_run_says_so_and_writes_nothing(plain: Course, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain.undisturbed, run)
    before = {path: path.read_bytes() for path in run.rglob("*.json*")}
    result = plain.train(run)
    assert result.returncode == 0
    assert "done, all 120 steps" in result.stderr
    assert {path: path.read_bytes() for path in run.rglob("*.json*")} == before


def test_a_finished_run_that_is_made_longer_goes_on_from_its_full_state(
    plain: Course, tmp_path: Path
) -> None:
    from milepost.core.errors import UsageError

    run, whole = tmp_path / "run", tmp_path / "whole"
    constant = ("--schedule.name", "constant")
    longer = (*constant, "--train.total_steps", "40")
    plain.train_here(run, *constant, "--train.total_steps", "20")
    with pytest.raises(UsageError, match=r"train\.total_steps"):
        plain.train_here(run, *longer)
    command = plain.command(run, *longer, "--override", "--ranks", "1")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plain.train_here(whole, *longer)
    assert weights_sha256(run, 40) == weights_sha256(whole, 40)
