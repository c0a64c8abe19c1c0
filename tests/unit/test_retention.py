"""Retention: the last good train state always stays, and the disk is never fuller than planned."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milepost.checkpoint.audit import audit
from milepost.checkpoint.retention import drop_old_train_states, steps_to_drop
from milepost.config.recipe import load_recipe
from milepost.config.schema import CheckpointSection
from milepost.core.errors import CheckpointError, StorageError
from milepost.core.files import folder_bytes
from milepost.planner import disk
from milepost.planner.disk import DiskEstimate, estimate_disk
from milepost.runs.events import EventWriter, read_history
from milepost.runs.layout import RunLayout
from milepost.train import saving
from tests.saving_runs import TinyRun, assert_equal, train_states
from tests.small_checkpoints import find, make_checkpoints
from tests.training import environment, events, train_here, write_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_good_train_state_stays_until_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    run = TinyRun(tmp_path, keep=keep)
    run.save_all(1, 2)
    before = run.saved(2)
    # At every rename of the next save, that which publishes it included.
    seen: list[bool] = []
    really = Path.rename

    def look(path: Path, target: Path) -> Path:
        seen.append((run.layout.checkpoint(2) / "train_state" / "manifest.json").is_file())
        return really(path, target)

    monkeypatch.setattr(Path, "rename", look)
    run.save_all(3)
    assert len(seen) >= 2 and all(seen[:-1]), "only the last may be the one that drops it"
    monkeypatch.undo()
    assert 3 in run.train_states() and len(run.train_states()) == keep
    if keep == 2:
        assert_equal(run.saved(2), before)


@pytest.mark.parametrize(
    ("steps", "keep", "every", "scheduled", "dropped"),
    [
        ([3, 7, 10], 1, None, 10, [7]),  # the run began at 3
        ([3, 7, 10, 20], 1, None, 10, [3, 7]),
        ([10, 20, 30, 40], 2, None, None, [10, 20]),
        ([10, 20, 30, 40], 1, None, 10, [10, 20]),
        ([10, 20, 23, 27], 2, None, 10, []),  # what stops left makes no scheduled one go
        ([10, 20, 23, 27, 28], 2, None, 10, [23]),
        ([10, 20, 30, 33], 1, 10, 10, []),
        ([4, 7], 1, None, 10, [4]),
    ],
)
def test_the_newest_two_scheduled_train_states_stay_for_a_rollback(
    steps: list[int], keep: int, every: int | None, scheduled: int | None, dropped: list[int]
) -> None:
    found = steps_to_drop(steps, keep=keep, every_steps=every, scheduled=scheduled, first_step=3)
    assert found == dropped


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_that_may_not_have_reached_the_disk_makes_no_other_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    run = TinyRun(tmp_path, keep=keep)
    run.save_all(1, 2)
    held = run.train_states()
    publish = saving.save_checkpoint

    def fail_after_publishing(*arguments: Any, **options: Any) -> Any:
        publish(*arguments, **options)
        raise StorageError("cannot write: input/output error")  # the rename was not forced

    monkeypatch.setattr(saving, "save_checkpoint", fail_after_publishing)
    with pytest.raises(StorageError, match="input/output error"):
        run.save_all(3)
    assert run.train_states() == [*held, 3]
    assert run.recorded("train_state_dropped") == ([1] if keep == 1 else [])


def test_a_train_state_that_nobody_vouches_for_makes_no_other_go(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, keep=2)
    run.save_all(1, 2)
    run.writer.good_step = 1
    run.writer.config = CheckpointSection(keep_train_state=1)
    assert run.writer.drop_old() == []
    assert run.train_states() == [1, 2]


def test_a_dropped_train_state_is_on_record_before_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_checkpoints(tmp_path / "run", 10, 20)
    events = EventWriter(layout.events, segment=1)
    seen: list[str] = []
    forced, renamed = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        seen.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        forced(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        seen.append(f"rename {path.name}")
        return renamed(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)

    def record(step: int) -> None:
        events.append_durably("train_state_dropped", step=step)

    assert (
        drop_old_train_states(layout, good_step=20, keep=2, every_steps=None, record=record) == []
    )
    assert drop_old_train_states(layout, good_step=20, keep=1, every_steps=None, record=record) == [
        10
    ]
    assert seen.index("fsync events.jsonl") < seen.index("rename train_state")
    assert [e["step"] for e in read_history(layout.events).events] == [10]
    assert not (layout.checkpoint(10) / "train_state").exists()
    found, aside = find(layout, 10)
    assert found is not None and (found.step, aside) == (20, [])


KEEP_ONE = ("--checkpoint.keep_train_state", "1")


def test_the_only_train_state_is_never_dropped_for_a_damaged_one(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """keep=1: the newest is damaged after it was written, the next save fails, then all is well."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    two = ("--checkpoint.keep_train_state", "2", "--train.stop_at_step", "10")
    train_here(recipe, run, tiny_data, *two)
    damaged = run / "checkpoints" / "step-00000010" / "train_state" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    def fail(*arguments: Any, **options: Any) -> None:
        raise StorageError("cannot write: no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", fail)
        with pytest.raises(StorageError, match="no space left"):
            train_here(recipe, run, tiny_data, *KEEP_ONE)
    assert [event["step"] for event in events(run, "checkpoint_quarantined")] == [10]
    assert train_states(run) == [5]
    train_here(recipe, run, tiny_data, *KEEP_ONE)
    assert train_states(run) == [30]
    (replayed,) = events(run, "replayed")[-1:]
    assert replayed["equal"] == replayed["compared"] > 0


def test_where_the_only_train_state_is_damaged_nothing_starts_over(
    tmp_path: Path, tiny_data: Path
) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    train_here(recipe, run, tiny_data, *KEEP_ONE, "--train.stop_at_step", "10")
    assert train_states(run) == [10]
    shutil.rmtree(run / "checkpoints" / "step-00000010" / "train_state")
    with pytest.raises(CheckpointError, match="none of the 2 known checkpoints can be used"):
        train_here(recipe, run, tiny_data, *KEEP_ONE)


@pytest.mark.parametrize("is_log_lost", [False, True])
def test_a_run_with_damaged_checkpoints_that_no_event_names_does_not_start_over(
    is_log_lost: bool, tmp_path: Path, tiny_data: Path
) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    train_here(recipe, run, tiny_data, "--train.stop_at_step", "5")
    log = run / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"checkpoint_saved"' not in line))
    if is_log_lost:
        log.unlink()
    (run / "checkpoints" / "step-00000005" / "config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of the 1 known checkpoints can be used"):
            train_here(recipe, run, tiny_data)


def test_a_checkpoint_that_is_saved_again_after_damage_is_recorded_again(
    tmp_path: Path, tiny_data: Path
) -> None:
    """Set aside, trained and published again, then killed before its event."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    train_here(recipe, run, tiny_data, "--train.stop_at_step", "10")
    sha256 = events(run, "checkpoint_saved")[-1]["sha256"]
    EventWriter(run / "events.jsonl", segment=1).append("checkpoint_quarantined", step=10)
    train_here(recipe, run, tiny_data, "--train.stop_at_step", "15")
    again = [e for e in events(run, "checkpoint_saved") if e["step"] == 10][1:]
    assert [(e["sha256"], e["recovered"]) for e in again] == [(sha256, True)]
    assert audit(RunLayout(run)).findings == []


class FullestDisk:
    """The most bytes that ever lay under a folder: looked at before each file goes.

    Between two deletions a folder only grows, so nothing larger is missed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.num_bytes = 0

    def look(self) -> None:
        self.num_bytes = max(self.num_bytes, folder_bytes(self._folder))


@pytest.fixture
def fullest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FullestDisk]:
    """Of the folder `run`."""
    fullest = FullestDisk(tmp_path / "run")
    really = os.unlink

    def unlink(*arguments: Any, **options: Any) -> None:
        fullest.look()
        really(*arguments, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    yield fullest


@pytest.fixture
def tight_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files as small as those of the tiny model, so that one tensor too many is seen."""
    monkeypatch.setattr(disk, "FOLDER_BYTES", 48 << 10)
    monkeypatch.setattr(disk, "LOG_BYTES", 16 << 10)


def plan_of(recipe: Path, *overrides: str) -> DiskEstimate:
    return estimate_disk(load_recipe(str(recipe), overrides=("--data.path", "x", *overrides)))


RETENTIONS = [
    (),
    KEEP_ONE,
    ("--checkpoint.keep_train_state", "3"),
    ("--checkpoint.keep_train_state_every_steps", "10"),
    (*KEEP_ONE, "--checkpoint.weights_dtype", "bfloat16"),
]


@pytest.mark.usefixtures("tight_plan")
@pytest.mark.parametrize("options", RETENTIONS)
def test_the_disk_is_never_fuller_than_planned(
    tmp_path: Path, tiny_data: Path, fullest: FullestDisk, options: tuple[str, ...]
) -> None:
    recipe = write_recipe(tmp_path)
    disk = plan_of(recipe, *options)
    train_here(recipe, tmp_path / "run", tiny_data, *options)
    fullest.look()
    assert disk.peak_bytes - disk.train_state_bytes < fullest.num_bytes <= disk.peak_bytes
    assert folder_bytes(tmp_path / "run") <= disk.run_bytes


# Where a kill comes, and at which call: the last save but one has written its model file, is to
# be published, is whole while nothing older is dropped, is in the middle of the drop.
KILLS = [
    ("milepost.checkpoint.store", "_write_train_state", 5),
    ("milepost.checkpoint.store", "publish_folder", 5),
    ("milepost.train.saving", "drop_old_train_states", 6),
    ("shutil", "rmtree", 9),
]


@pytest.mark.usefixtures("tight_plan")
@pytest.mark.parametrize(("module", "name", "when"), KILLS)
def test_the_disk_is_never_fuller_than_planned_after_a_kill_inside_a_save(
    tmp_path: Path,
    tiny_data: Path,
    fullest: FullestDisk,
    module: str,
    name: str,
    when: int,
) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            _KILLED,
            module,
            name,
            str(when),
            *map(str, (recipe, run, tiny_data)),
        ],
        env=environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "step 20  checkpoint saved" in killed.stderr
    fullest.look()
    train_here(recipe, run, tiny_data, *KEEP_ONE)
    fullest.look()
    assert fullest.num_bytes <= plan_of(recipe, *KEEP_ONE).peak_bytes
    assert train_states(run) == [30]
    litter = [path.name for path in (run / "checkpoints").iterdir() if path.name[0] == "."]
    assert litter == []


_KILLED = """
import importlib, os, signal, sys
from pathlib import Path
from tests.training import train_here

module, name, when, recipe, run, data = sys.argv[1:]
module = importlib.import_module(module)
really, calls = getattr(module, name), []

def kill(*arguments, **options):
    calls.append(1)
    if len(calls) == int(when):
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*arguments, **options)

setattr(module, name, kill)
train_here(Path(recipe), Path(run), Path(data), "--checkpoint.keep_train_state", "1")
"""
