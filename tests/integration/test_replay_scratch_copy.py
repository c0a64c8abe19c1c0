"""The scratch copy that a replay trains in: made, stopped, left by a kill, and cleared away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milepost.cli.main import run as milepost
from tests.training import environment, left_beside


def test_a_train_state_that_goes_while_it_is_copied_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from milepost.experiments import scratch_copy

    really = scratch_copy._link

    def training_drops_it(source: Path, target: Path) -> None:
        if source.name == "optimizer.safetensors":
            shutil.rmtree(source.parent)
        really(source, target)

    monkeypatch.setattr(scratch_copy, "_link", training_drops_it)
    assert milepost(["verify", str(run), "--replay"]) == 4
    err = capsys.readouterr().err
    assert "step-00000009/train_state/optimizer.safetensors went away while it was read" in err
    assert "hint: if a training is at work in this folder" in err
    assert left_beside(run) == []


def test_what_a_killed_replay_left_goes_with_the_next_and_a_living_one_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.core.files import exclusive_lock
    from milepost.experiments import scratch_copy

    dead, living = (run.parent / f".run-replay-{name}" for name in ("dead", "living"))
    for folder in (dead, living):
        folder.mkdir()
        (folder / scratch_copy.SCRATCH_LOCK).touch()
    monkeypatch.setattr(scratch_copy, "free_bytes", lambda path: 0)  # it ends soon after
    with exclusive_lock(living / scratch_copy.SCRATCH_LOCK, what="a replay"):
        assert milepost(["verify", str(run), "--replay"]) == 7
    assert left_beside(run) == [living.name]


def note_deletions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are deleted from now on."""
    names: list[str] = []
    really = os.unlink

    def note(path: str | Path, *, dir_fd: int | None = None) -> None:
        names.append(Path(path).name)
        really(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", note)
    return names


def test_the_lock_of_a_scratch_copy_is_the_last_of_it_that_goes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.experiments.replay_plan import plan_replay
    from milepost.experiments.scratch_copy import SCRATCH_LOCK, scratch_copy
    from milepost.runs.layout import RunLayout

    plan = plan_replay(RunLayout(run), from_step=None, data=None)
    for name in "abcd":  # killed replays; the order in a folder is chance
        dead = run.parent / f".run-replay-{name}"
        for file in (dead / "run" / "weights", dead / "recipe.toml", dead / SCRATCH_LOCK):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    names = note_deletions(monkeypatch)
    with scratch_copy(plan):
        assert names == ["weights", "recipe.toml", SCRATCH_LOCK] * 4
        names.clear()
    assert names.index(SCRATCH_LOCK) == len(names) - 1 > 10
    assert left_beside(run) == []


def start_replay(run: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "milepost.cli.main", "verify", str(run), "--replay"]
    process = subprocess.Popen(
        [*words, "--ranks", "1"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not left_beside(run):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.long)],
)
def test_a_stop_ends_the_training_and_leaves_nothing(
    run: Path, signum: signal.Signals, code: int
) -> None:
    process = start_replay(run)
    scratch = run.parent / left_beside(run)[0]
    time.sleep(0.5)  # somewhere in the training's start
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, (out, err)
    assert "Traceback" not in err
    assert left_beside(run) == []
    assert not (run / "certificates").exists() or not any((run / "certificates").iterdir())
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(scratch) not in listed, "the training has ended too"
