"""Saves go on beside training: what reaches the file, what waits, what a failing disk does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.checkpoint.host_copy import HostCopy
from milepost.checkpoint.state import Progress, TrainState
from milepost.config.schema import CheckpointSection
from milepost.core.errors import DivergedError, MilepostError, StorageError
from milepost.data.shards import open_prepared
from milepost.runs.events import EventWriter, read_history
from milepost.runs.layout import RunLayout
from milepost.train import loop, saving
from milepost.train.saving import Saver
from milepost.train.step import Stepper
from milepost.train.stop import StopSignal
from tests.saving_runs import Gate, TinyRun, assert_equal, fail_first
from tests.training import environment, events, train_here, write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """At the start of every write."""
    gate = Gate(monkeypatch, saving, "save_checkpoint")
    yield gate
    gate.open()


def test_what_is_trained_while_a_save_is_written_does_not_reach_the_file(
    run: TinyRun, gate: Gate
) -> None:
    first = run.train()
    assert not run.saver.is_saving()
    run.save(1)
    gate.wait_until_met()
    assert run.saver.is_saving()
    second = run.train()
    gate.open()
    run.saver.finish()
    assert not run.saver.is_saving()
    assert_equal(run.saved(1), first)
    run.save(2)
    run.saver.finish()
    assert_equal(run.saved(2), second)
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])


def test_the_copy_on_the_host_shares_no_memory_with_training_and_is_used_again(
    run: TinyRun,
) -> None:
    weights = run.model.state_dict()
    copy = HostCopy(sum(t.nbytes for t in weights.values()), device=torch.device("cpu"))
    state = TrainState(progress=Progress(step=3), weights=weights, moments={}, optimizer_step=3)
    first, second = copy.fill(state), copy.fill(state)
    assert first.progress == state.progress and first.optimizer_step == 3
    places = [{n: t.data_ptr() for n, t in s.weights.items()} for s in (state, first, second)]
    assert places[1] == places[2]
    assert set(places[0].values()).isdisjoint(places[1].values())
    assert_equal(first.weights, weights)


def test_a_save_waits_for_the_one_before(run: TinyRun, gate: Gate) -> None:
    first = run.train()
    run.save(1)
    gate.wait_until_met()
    second = run.train()
    waiting = threading.Thread(target=run.save, args=(2,))
    waiting.start()
    waiting.join(timeout=0.2)
    assert waiting.is_alive() and gate.num_calls == 1
    gate.open()
    waiting.join(timeout=30)
    run.saver.finish()
    assert run.recorded("checkpoint_saved") == [1, 2]
    assert_equal(run.saved(1), first)
    assert_equal(run.saved(2), second)


def test_a_step_is_saved_once(run: TinyRun) -> None:
    run.save_all(1)
    run.save(1)
    run.saver.finish()
    assert run.recorded("checkpoint_saved") == [1]


def test_how_long_training_waited_is_recorded(run: TinyRun) -> None:
    run.save_all(1)
    (event,) = read_history(run.layout.events).of_kind("checkpoint_saved")
    assert 0 < event["waited_seconds"] < 60 and event["seconds"] > 0


def test_a_failed_write_is_raised_at_the_next_step_and_only_once(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train()
    fail_first(monkeypatch, saving, "save_checkpoint")
    run.saver.raise_failure(Progress(step=1))
    run.save(1)
    with pytest.raises(StorageError, match="no space left"):
        for step in range(2, 10_000_000):  # as the loop calls it, until the write has ended
            run.saver.raise_failure(Progress(step=step))
    run.saver.raise_failure(Progress(step=3))
    run.saver.finish()


@pytest.mark.parametrize("wait", [Saver.finish, lambda saver: saver.save(Progress(step=2))])
def test_a_failed_write_is_raised_where_training_waits_for_it(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, wait: Callable[[Saver], None]
) -> None:
    run.train()
    fail_first(monkeypatch, saving, "save_checkpoint")
    run.save(1)
    with pytest.raises(StorageError, match="no space left"):
        wait(run.saver)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["weights", "moments"])
def test_a_state_that_is_not_finite_is_never_written(
    run: TinyRun, place: str, value: float
) -> None:
    run.save_all(1)
    run.train()
    tensor = next(reversed(list(run.model.parameters())))
    if place == "moments":
        tensor = run.optimizer.state[tensor]["exp_avg_sq"]
    with torch.no_grad():
        tensor.view(-1)[-1] = value
    run.save(2)
    with pytest.raises(DivergedError, match=r"step 2: .*lm_head\.weight is not finite"):
        run.saver.finish()
    assert run.recorded("checkpoint_saved") == [1] and run.train_states() == [1]
    assert [p.name for p in run.layout.checkpoints.iterdir()] == ["step-00000001"]


def test_a_weight_that_no_loss_shows_ends_a_run_at_its_next_save(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = tmp_path / "run", open_prepared(tiny_data)
    assert data.validation is not None
    used = {int(t) for s in (data.train, data.validation) for t in s.read(0, s.num_tokens)}
    unused = min(set(range(data.vocab_size)) - used)
    really = Stepper._update

    def update(self: Stepper, *words: Any) -> None:
        really(self, *words)
        if len(events(run, "step")) == 6:
            embedding = self._optimizer.param_groups[0]["params"][0]
            assert embedding.shape == (data.vocab_size, 32)
            with torch.no_grad():
                embedding[unused, 0] = float("inf")

    monkeypatch.setattr(Stepper, "_update", update)
    with pytest.raises(DivergedError, match=r"embed_tokens\.weight is not finite") as error:
        train_here(write_recipe(tmp_path), run, tiny_data)
    assert error.value.exit_code == 5
    assert events(run, "step")[-1]["step"] >= 10 and events(run, "batch_skipped") == []
    assert [event["step"] for event in events(run, "checkpoint_saved")] == [5]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000005"]
    assert events(run, "segment_ended")[-1]["reason"] == "diverged"


@pytest.mark.parametrize("error", [None, DivergedError("not finite"), ValueError("a bug")])
def test_every_way_out_waits_for_the_save_under_way(
    run: TinyRun, gate: Gate, error: Exception | None
) -> None:
    expected = run.train()
    opener = threading.Timer(0.1, gate.open)
    opener.start()
    try:
        with run.saver:
            run.save(1)
            if error is not None:
                raise error
    except (DivergedError, ValueError) as caught:
        assert caught is error
    opener.join()
    assert_equal(run.saved(1), expected)
    assert run.recorded("checkpoint_saved") == [1]


def test_a_failed_save_is_said_and_does_not_hide_what_ended_the_run(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.train()
    fail_first(monkeypatch, saving, "save_checkpoint")
    with pytest.raises(DivergedError), run.saver:
        run.save(1)
        raise DivergedError("not finite")
    assert "warning: cannot write: no space left on device; the newest" in capsys.readouterr().err


def test_a_failed_last_save_ends_a_run_that_is_otherwise_done(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train()
    fail_first(monkeypatch, saving, "save_checkpoint")
    with pytest.raises(StorageError, match="no space left"), run.saver:
        run.save(1)


def test_a_save_that_fails_is_not_tried_again_where_nothing_was_freed(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save_all(1, 2)
    calls = fail_first(monkeypatch, saving, "save_checkpoint")
    with pytest.raises(StorageError, match="no space left"):
        run.save_all(3)
    assert len(calls) == 1
    assert run.recorded("checkpoint_saved") == [1, 2]
    assert run.train_states() == [1, 2]


def test_a_save_that_fails_is_tried_again_after_retention_freed_something(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save_all(1, 2)
    run.writer.config = CheckpointSection(keep_train_state=1)
    calls = fail_first(monkeypatch, saving, "save_checkpoint")
    run.save_all(3)
    assert len(calls) == 2
    assert run.recorded("checkpoint_saved") == [1, 2, 3]
    assert run.recorded("train_state_dropped") == [1, 2]


def test_a_checkpoint_whose_event_fails_is_recorded_later_and_not_written_again(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save_all(1, 2)
    saves = []
    really = saving.save_checkpoint
    monkeypatch.setattr(
        saving, "save_checkpoint", lambda *a, **k: saves.append(a) or really(*a, **k)
    )
    fail_first(monkeypatch, EventWriter, "append")
    run.save_all(3)
    assert len(saves) == 1
    assert run.recorded("checkpoint_saved") == [1, 2, 3]
    assert run.recorded("train_state_dropped") == [1]
    run.save_all(4)
    assert len(saves) == 2
    assert run.recorded("checkpoint_saved") == [1, 2, 3, 4]


def test_training_raises_a_failed_save_before_its_next_save(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_first(monkeypatch, saving, "save_checkpoint")
    really = loop.run_loop
    monkeypatch.setattr("milepost.train.rank.run_loop", lambda parts: really(slowly(parts)))

    def slowly(parts: loop.LoopParts) -> loop.LoopParts:
        """Every step after the first save waits for the write that fails."""
        saver = parts.saver
        assert saver is not None
        run_step = parts.stepper.run_step

        def step(*arguments: Any, **options: Any) -> Any:
            if saver._writing is not None:
                saver._writing.exception()
            return run_step(*arguments, **options)

        monkeypatch.setattr(parts.stepper, "run_step", step)
        return parts

    with pytest.raises(StorageError, match="no space left"):
        train_here(write_recipe(tmp_path), tmp_path / "run", tiny_data)
    assert events(tmp_path / "run", "step")[-1]["step"] == 6, "saved at 5, said after 6"
    (ended,) = events(tmp_path / "run", "segment_ended")
    assert (ended["reason"], ended["step"]) == ("storage", 6)


def test_the_history_is_on_the_disk_before_a_checkpoint_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    training = TinyRun(tmp_path)
    training.writer.events.append("step", step=1)
    monkeypatch.setattr("milepost.runs.events.fsync_file", lambda path: done.append(path.name))
    save = saving.save_checkpoint

    def save_and_note(*arguments: Any, **named: Any) -> Any:
        done.append("checkpoint")
        return save(*arguments, **named)

    monkeypatch.setattr(saving, "save_checkpoint", save_and_note)
    training.save_all(1)
    assert done == ["events.jsonl", "checkpoint"]


def test_no_memory_for_a_save_is_said_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, mark = TinyRun(tmp_path), tmp_path / "mark"

    def fail(*arguments: Any, **named: Any) -> None:
        assert mark.exists()
        raise MemoryError

    monkeypatch.setattr(saving, "save_checkpoint", fail)
    training.saver._mark = mark
    with pytest.raises(MilepostError, match="out of memory while a checkpoint was written"):
        training.save_all(1)
    assert not mark.exists()


def test_a_stop_saves_and_waits(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    opener, run = threading.Timer(0.3, gate.open), tmp_path / "run"
    is_requested = "milepost.train.stop.StopSignal.is_requested"
    monkeypatch.setattr(is_requested, lambda self: bool(events(run, "validation")))
    opener.start()
    result = train_here(write_recipe(tmp_path), run, tiny_data)
    opener.join()
    assert (result["status"], result["step"]) == ("stopped", 1)
    kinds = [e["kind"] for e in read_history(RunLayout(tmp_path / "run").events).events]
    assert kinds[-2:] == ["checkpoint_saved", "segment_ended"]


def test_a_second_interrupt_does_not_wait_for_a_save(tmp_path: Path) -> None:
    words = "from tests.unit import test_saving; test_saving.interrupt_twice_while_saving()"
    child = subprocess.run(
        [sys.executable, "-c", words], cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)}
    )
    assert child.returncode == 130


def interrupt_twice_while_saving() -> None:
    """In a process of its own, which it ends: the main thread waits for a write without end."""
    signal.alarm(60)
    StopSignal()
    run = TinyRun(Path.cwd())
    run.train()
    saving.save_checkpoint = lambda *arguments, **options: threading.Event().wait()  # type: ignore[assignment]
    run.save(1)
    for seconds in (0.1, 0.3):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    run.saver.finish()
