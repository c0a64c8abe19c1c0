"""Runs with live trackers: what arrives in them, and that the run does not notice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milepost.core.errors import UsageError
from milepost.train import tracking
from tests.training import (
    events,
    kill_group,
    logged_steps,
    start,
    train_here,
    wait_for_step,
    weights_sha256,
)

TOOLS = ("tensorboard", "trackio", "wandb")
OFFLINE = ("--tracking.mode", "offline", "--tracking.tools")

SENT = {
    "train/loss": ("step", "loss_nats"),
    "train/grad_norm": ("step", "grad_norm"),
    "train/learning_rate": ("step", "learning_rate"),
    "val/loss": ("validation", "loss_nats"),
    "val/bits_per_byte": ("validation", "bits_per_byte"),
}
"""Metric to its event's kind and field, of those that come out equal when run again."""


@pytest.fixture(autouse=True, scope="module")
def time_enough() -> Iterator[None]:
    """Tests are about what arrives, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "FINISH_SECONDS", 100.0)
        yield


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tracked(
    recipe: Path,
    tiny_data: Path,
    trackio_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run with all trackers in two segments; steps 11 to 15 were run twice."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    tools = (*OFFLINE, ",".join(TOOLS))
    train_here(recipe, run, tiny_data, *tools, "--train.stop_at_step", "15")
    shutil.rmtree(run / "checkpoints" / "step-00000015")
    assert train_here(recipe, run, tiny_data, *tools)["status"] == "done"
    return run


def expected(run: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) as the history has it, each step once."""
    kind, field = SENT[metric]
    return sorted({event["step"]: event[field] for event in events(run, kind)}.items())


def test_the_run_is_the_same_as_without_trackers(tracked: Path, finished: Path) -> None:
    assert logged_steps(tracked) == logged_steps(finished)
    assert weights_sha256(tracked, 30) == weights_sha256(finished, 30)
    assert events(tracked, "tracking_failed") == []
    assert [(e["compared"], e["equal"]) for e in events(tracked, "replayed")] == [(5, 5)]


@pytest.mark.parametrize("metric", SENT)
def test_tensorboard_shows_every_step_once(tracked: Path, metric: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tracked / "tracking" / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found = [(scalar.step, scalar.value) for scalar in read.Scalars(metric)]
    in_float32 = [
        (s, struct.unpack("f", struct.pack("f", v))[0]) for s, v in expected(tracked, metric)
    ]
    assert found == in_float32
    assert "_hparams_/session_start_info" in read.Tags()["tensors"]


@pytest.mark.parametrize("metric", SENT)
def test_trackio_has_one_run_with_every_step_once(
    tracked: Path, trackio_folder: Path, metric: str
) -> None:
    with sqlite3.connect(trackio_folder / "milepost.db") as database:
        rows = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
        ((config,),) = database.execute("select config from configs").fetchall()
    assert len({run_id for run_id, _, _ in rows}) == 1
    values = [(step, json.loads(metrics).get(metric)) for _, step, metrics in rows]
    assert [(s, v) for s, v in values if v is not None] == expected(tracked, metric)
    assert json.loads(config)["model"]["hidden_size"] == 32


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of an offline run, from LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of all segments, in their order."""
    return [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for folder in sorted((run / "tracking" / "wandb").glob("offline-run-*"))
        for record in wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.mark.parametrize("metric", SENT)
def test_wandb_has_every_step_once_over_all_segments(tracked: Path, metric: str) -> None:
    rows = wandb_rows(tracked)
    assert [(row["step"], row[metric]) for row in rows if metric in row] == expected(
        tracked, metric
    )
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_all_segments_are_one_wandb_run_with_the_recipe_as_its_config(tracked: Path) -> None:
    run_id = json.loads((tracked / "manifest.json").read_text())["run_id"]
    folders = list((tracked / "tracking" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    for folder in folders:
        (made,) = [r.run for r in wandb_records(folder) if r.WhichOneof("record_type") == "run"]
        assert (made.run_id, made.display_name, made.project) == (run_id, "run", "milepost")
        config = {item.key: json.loads(item.value_json) for item in made.config.update}
        assert config["optimizer"]["learning_rate"] == 3e-3


def test_the_steps_are_the_axis_of_every_wandb_chart(tracked: Path) -> None:
    (folder, _) = sorted((tracked / "tracking" / "wandb").glob("offline-run-*"))
    metrics = [r.metric for r in wandb_records(folder) if r.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]


def test_a_tracker_that_is_turned_on_later_is_told_of_the_whole_run(
    recipe: Path, tiny_data: Path, finished: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train_here(recipe, run, tiny_data, "--train.stop_at_step", "15")
    assert not (run / "tracking").exists()
    train_here(recipe, run, tiny_data, *OFFLINE, "tensorboard", "--run.name", "now with a name")
    read = EventAccumulator(str(run / "tracking" / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    assert [scalar.step for scalar in read.Scalars("train/loss")] == list(range(1, 31))
    assert weights_sha256(run, 30) == weights_sha256(finished, 30)


FAKE = """
import os, signal, time

class Settings:
    def __init__(self, **given): pass

class Run:
    url, dir = "http://there", "."
    def define_metric(self, *given, **named): pass
    def finish(self): print("finished")
    def log(self, metrics, **named): LOG

def init(**given):
    INIT
    return Run()

def teardown(): pass
"""


def fake_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch, *, init: str, log: str) -> None:
    """A package of that name that the process of the tracker finds before the real one."""
    (folder / "wandb.py").write_text(FAKE.replace("INIT", init).replace("LOG", log))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("init", "log", "reason"),
    [
        ("raise RuntimeError('no account\\nsee there')", "pass", "RuntimeError: no account"),
        ("pass", "raise OSError('disk full')", "OSError: disk full"),
        ("pass", "os.kill(os.getpid(), signal.SIGKILL)", "its process ended with code -9"),
        ("import no_such_package", "pass", "ModuleNotFoundError: No module named"),
    ],
)
def test_a_tracker_that_fails_is_off_and_the_run_is_the_same(
    init: str,
    log: str,
    reason: str,
    recipe: Path,
    tiny_data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fake_wandb(tmp_path, monkeypatch, init=init, log=log)
    run = tmp_path / "run"
    assert train_here(recipe, run, tiny_data, *OFFLINE, "wandb")["status"] == "done"
    (failed,) = events(run, "tracking_failed")
    assert failed["tool"] == "wandb" and failed["reason"].startswith(reason)
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1 and "wandb is off until the next start" in said[0]
    assert logged_steps(run) == logged_steps(finished)
    assert weights_sha256(run, 30) == weights_sha256(finished, 30)


def test_what_a_tracker_prints_is_kept_from_the_terminal(
    recipe: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fake_wandb(tmp_path, monkeypatch, init="pass", log="print('chatter')")
    run = tmp_path / "run"
    train_here(recipe, run, tiny_data, *OFFLINE, "wandb", "--train.stop_at_step", "2")
    out, err = capfd.readouterr()
    assert "chatter" not in out + err and "wandb: http://there" in err
    assert (run / "tracking" / "wandb" / "talk.log").read_text().endswith("finished\n")


def test_a_run_that_is_asked_to_stop_leaves_a_tracker_that_hangs(
    recipe: Path,
    tiny_data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from milepost.train import watching

    validate = watching.validate

    def stop_here(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*given, **named)

    fake_wandb(tmp_path, monkeypatch, init="pass", log="time.sleep(3600)")
    monkeypatch.setattr(watching, "validate", stop_here)
    monkeypatch.setattr(tracking, "STOPPING_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 3.0)
    run = tmp_path / "run"
    assert train_here(recipe, run, tiny_data, *OFFLINE, "wandb")["status"] == "stopped"
    assert "wandb still delivers the end and leaves in 3 s at most" in capfd.readouterr().err
    monkeypatch.setattr(watching, "validate", validate)
    assert train_here(recipe, run, tiny_data)["status"] == "done"
    assert weights_sha256(run, 30) == weights_sha256(finished, 30)
    _wait_until_alone(run)


def test_a_run_that_is_done_waits_a_while_for_a_tracker_that_hangs(
    recipe: Path,
    tiny_data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_wandb(tmp_path, monkeypatch, init="pass", log="time.sleep(3600)")
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    run = tmp_path / "run"
    assert train_here(recipe, run, tiny_data, *OFFLINE, "wandb")["status"] == "done"
    (failed,) = events(run, "tracking_failed")
    assert failed["reason"] == "it had not taken everything in 1 s after the end"
    assert weights_sha256(run, 30) == weights_sha256(finished, 30)


@pytest.mark.long
def test_what_was_logged_before_a_kill_arrives_once_and_nothing_is_left_behind(
    recipe: Path, tiny_data: Path, tmp_path: Path, trackio_folder: Path
) -> None:
    run = tmp_path / "killed"
    words = (*OFFLINE, ",".join(TOOLS), "--train.total_steps", "2000")
    process = start(recipe, run, tiny_data, *words)
    wait_for_step(run, 20)
    kill_group(process)
    # At once: the trackers of the killed segment may still be at work.
    stop = str(max(logged_steps(run)) + 10)
    train_here(recipe, run, tiny_data, *words, "--train.stop_at_step", stop)
    _wait_until_alone(run)
    sent = [(row["step"], row["train/loss"]) for row in wandb_rows(run) if "train/loss" in row]
    assert sent == expected(run, "train/loss")


def _wait_until_alone(run: Path) -> None:
    deadline = time.monotonic() + 15
    while mine := _processes_for(run):
        assert time.monotonic() < deadline, mine
        time.sleep(0.05)


def _processes_for(run: Path) -> list[str]:
    """Command lines that name the run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(run) in words:
            found.append(words)
    return found


def test_a_tracker_that_is_not_installed_is_refused_before_the_run_is_made(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n))
    with pytest.raises(UsageError, match="not installed: wandb"):
        train_here(recipe, tmp_path / "run", tiny_data, "--tracking.tools", "wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_replay_of_a_tracked_run_tells_no_tracker(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.experiments.replay import replay

    mark = tmp_path / "told"
    fake_wandb(tmp_path, monkeypatch, init=f"open({str(mark)!r}, 'w')", log="pass")
    run = tmp_path / "run"
    train_here(recipe, run, tiny_data, *OFFLINE, "wandb", "--train.stop_at_step", "10")
    mark.unlink()
    certificate, _ = replay(run, ranks=1, command="test")
    assert certificate.is_equal
    assert not mark.exists()
