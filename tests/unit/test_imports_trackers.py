"""Trajectories from TensorBoard's and wandb's own files, written by the real packages."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from milepost.core.errors import UsageError
from milepost.trajectory.imports.formats import import_course
from milepost.trajectory.imports.wandb_log import BLOCK_BYTES, WandbLog

WRITE_OFFLINE = """
import os, sys, wandb
settings = wandb.Settings(console="off", silent=True)
runs = (("abc/1", 1, 30), ("abc/2", 21, 40), ("other", 1, 2))
for folder, first, last in runs:
    run_id = folder.split("/")[0]
    os.makedirs(sys.argv[1] + "/" + folder)
    run = wandb.init(
        project="p", mode="offline", dir=sys.argv[1] + "/" + folder, id=run_id,
        name="mine" if run_id == "abc" else "", settings=settings,
    )
    for step in range(first, last + 1):
        run.log({"train/loss": 8.0 / step, "tokens": 100 * step, "text": "x" * 3000}, step=step)
    run.log({"opt": {"lr": 0.5}, "wrong": float("nan")}, step=last)
    run.finish()
"""


def _write_events(folder: Path, values: dict[int, float], suffix: str = "") -> Path:
    """An event file with one scalar in the old form and one in the new."""
    writer = EventFileWriter(str(folder), filename_suffix=suffix)
    for step, value in values.items():
        old = Summary.Value(tag="train/loss", simple_value=value)
        summaries = (Summary(value=[old]), scalar_pb("eval_loss", value + 1))
        for summary in summaries:
            writer.add_event(Event(wall_time=1.0, step=step, summary=summary))
    writer.close()
    return max(folder.iterdir(), key=lambda file: file.name)


@pytest.fixture(scope="module")
def wandb_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """abc: one run, resumed, steps 1 to 30, then 21 to 40, over many blocks. other: another."""
    folder = tmp_path_factory.mktemp("offline")
    words = [sys.executable, "-c", WRITE_OFFLINE, str(folder)]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def offline(wandb_folders: Path) -> Path:
    """The resumed run."""
    return wandb_folders / "abc"


def test_scalars_of_both_forms_are_read_from_event_files(tmp_path: Path) -> None:
    _write_events(tmp_path / "first", {1: 3.5, 2: 2.5, 3: float("nan")})
    course = import_course("tensorboard", tmp_path, tokens_per_step=10)
    loss = course.curves["train/loss"]
    assert (course.name, list(course.curves)) == ("first", ["train/loss", "val/loss"])
    assert (loss.steps.tolist(), loss.values.tolist()) == ([1, 2], [3.5, 2.5])
    assert course.curves["val/loss"].values.tolist() == [4.5, 3.5]
    assert loss.tokens.tolist() == [10, 20]
    assert "2 values that are not finite are left out." in course.notes


def test_of_a_resumed_run_the_later_event_file_counts(tmp_path: Path) -> None:
    _write_events(tmp_path, {1: 3.0, 2: 2.0}, suffix=".a")
    _write_events(tmp_path, {2: 1.5, 3: 1.0}, suffix=".b")
    loss = import_course("tensorboard", tmp_path).curves["train/loss"]
    assert loss.values.tolist() == [3.0, 1.5, 1.0]


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_event_file_is_read_up_to_there_and_it_is_said(
    tmp_path: Path, damage: str
) -> None:
    file = _write_events(tmp_path, {1: 3.0, 2: 2.0, 3: 1.0})
    content = bytearray(file.read_bytes())
    if damage == "torn":
        del content[-3:]
    else:
        content[-7] ^= 255
    file.write_bytes(content)
    course = import_course("tensorboard", tmp_path)
    assert course.curves["train/loss"].steps.tolist() == [1, 2, 3]
    assert course.curves["val/loss"].steps.tolist() == [1, 2]
    assert course.notes[0] == "1 event file is torn or damaged, and read up to there."


def test_event_files_of_two_folders_are_two_trajectories(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _write_events(tmp_path / name, {1: 3.0})
    with pytest.raises(UsageError, match="holds 2 trajectories") as caught:
        import_course("tensorboard", tmp_path)
    assert str(tmp_path / "one") in caught.value.message


def test_a_file_that_only_has_the_name_of_an_event_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(b"hello, this is a text " * 20)
    with pytest.raises(UsageError, match="1 event file without a scalar"):
        import_course("tensorboard", tmp_path)


def test_without_the_package_the_line_that_installs_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_events(tmp_path, {1: 3.0})
    name = "tensorboard.backend.event_processing.event_file_loader"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="needs the package tensorboard") as caught:
        import_course("tensorboard", tmp_path)
    assert caught.value.hint == "pip install 'milepost[trackers]'"


def test_an_offline_run_of_wandb_is_read_with_its_resume(offline: Path) -> None:
    course = import_course("wandb", offline)
    loss = course.curves["train/loss"]
    assert course.name == "mine"
    assert loss.steps.tolist() == list(range(1, 41))
    assert loss.values.tolist() == [8.0 / step for step in range(1, 41)]
    assert loss.tokens.tolist() == [100.0 * step for step in range(1, 41)]
    assert course.curves["opt.lr"].steps.tolist() == [30, 40]
    assert len(list(offline.rglob("*.wandb"))) == 2


def test_the_records_of_a_wandb_file_are_those_whose_checksums_hold(offline: Path) -> None:
    file = min(offline.rglob("*.wandb"))
    content = file.read_bytes()
    assert len(content) > 2 * BLOCK_BYTES
    with file.open("rb") as opened:
        whole_log = WandbLog(opened)
        every = list(whole_log.records())
    assert whole_log.num_damaged == 0
    file_with_damage = offline.parent / "damaged"
    file_with_damage.write_bytes(
        content[: BLOCK_BYTES + 900] + b"\xff" + content[BLOCK_BYTES + 901 : -4]
    )
    with file_with_damage.open("rb") as opened:
        log = WandbLog(opened)
        left = list(log.records())
    # Lost: what lay behind the damage in its block, and the torn last record.
    assert log.num_damaged == 2
    assert 0 < len(left) < len(every)
    assert set(left) < set(every)
    assert left[0] == every[0]


def test_a_damaged_wandb_file_is_read_around_the_damage_and_it_is_said(
    offline: Path, tmp_path: Path
) -> None:
    torn = tmp_path / "run-abc.wandb"
    torn.write_bytes(min(offline.rglob("*.wandb")).read_bytes()[:-5000])
    course = import_course("wandb", torn)
    assert course.curves["train/loss"].steps.tolist()[:3] == [1, 2, 3]
    assert course.notes[0] == "1 part of the run's files that cannot be read is left out."


def test_a_part_of_a_wandb_file_that_is_whole_and_no_record_is_left_out(
    offline: Path, tmp_path: Path
) -> None:
    content = min(offline.rglob("*.wandb")).read_bytes()[:BLOCK_BYTES]
    foreign = struct.pack("<IHB", zlib.crc32(b"\x01\xff\xff"), 2, 1) + b"\xff\xff"
    file = tmp_path / "run-abc.wandb"
    file.write_bytes(content + foreign)
    course = import_course("wandb", file)
    assert course.curves["train/loss"].steps.tolist()[:3] == [1, 2, 3]
    assert course.notes[0] == "1 part of the run's files that cannot be read is left out."


def test_two_runs_in_one_wandb_folder_are_refused_by_name(wandb_folders: Path) -> None:
    with pytest.raises(UsageError, match=r"holds 2 runs: mine \(2 files\) and other \(1 file\)"):
        import_course("wandb", wandb_folders)


def test_the_export_of_a_chart_loses_its_runs_name_and_its_extremes(tmp_path: Path) -> None:
    path = tmp_path / "wandb_export.csv"
    path.write_text(
        '"Step","mine - train/loss","mine - train/loss__MIN","mine - train/loss__MAX"\n'
        '"1","3.5","3.5","3.5"\n"2","2.5","2.5","2.5"\n'
    )
    course = import_course("wandb", path)
    assert (course.name, list(course.curves)) == ("mine", ["train/loss"])
    path.write_text('"Step","a - loss","b - loss"\n"1","3.5","4.5"\n')
    with pytest.raises(UsageError, match="holds 2 runs: a and b"):
        import_course("wandb", path)


def test_exported_histories_are_read_and_their_bad_lines_counted(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"_step": 5, "train/global_step": 1, "loss": 3.5, "_runtime": 9.0},
        {"_step": 6, "train/global_step": 1, "eval/loss": 4.0},
        {"_step": 7, "system.cpu": 1.0},
    ]
    lines = tmp_path / "history.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"_step"')
    course = import_course("wandb", lines)
    assert {name: c.steps.tolist() for name, c in course.curves.items()} == {
        "train/loss": [1],
        "val/loss": [1],
    }
    assert course.notes[0] == "1 line that cannot be read is left out."
    assert "1 record without a step is left out." in course.notes
    table = tmp_path / "history.parquet"
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    assert set(import_course("wandb", table).curves) == {"train/loss", "val/loss"}


def test_a_file_that_only_ends_like_wandbs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run-x.wandb").write_bytes(b"step,loss\n1,2\n")
    with pytest.raises(UsageError, match="is a table that begins with 'step,loss'"):
        import_course("wandb", tmp_path / "run-x.wandb")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        import_course("wandb", tmp_path / "x.parquet")
