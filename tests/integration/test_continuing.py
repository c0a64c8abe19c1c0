"""A run that is continued with changes: what is taken, recorded and compared."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from milepost.core.errors import DataError, UsageError
from tests.training import events, logged_steps, train_here, weights_sha256


@pytest.fixture
def half(recipe: Path, tiny_data: Path, tmp_path: Path) -> Path:
    """A run that stopped at step 15 with train states at 10 and 15."""
    run = tmp_path / "half"
    train_here(recipe, run, tiny_data, "--train.stop_at_step", "15")
    return run


def test_stopping_early_does_not_bend_the_schedule(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    train_here(recipe, half, tiny_data)
    assert logged_steps(half) == logged_steps(finished)
    assert weights_sha256(half, 30) == weights_sha256(finished, 30)


def test_a_segment_records_its_own_training_time(recipe: Path, tiny_data: Path, half: Path) -> None:
    train_here(recipe, half, tiny_data)
    recorded = sum(event["training_seconds"] for event in events(half, "segment_ended"))
    assert recorded == pytest.approx(sum(e["step_seconds"] for e in events(half, "step")))


def test_an_override_is_taken_recorded_and_remembered(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    option = ("--optimizer.learning_rate", "1e-4")
    stop = ("--train.stop_at_step", "17")
    train_here(recipe, half, tiny_data, *option, *stop, override=True)
    taken = events(half, "override")
    assert [(e["field"], e["old"], e["new"]) for e in taken] == [
        ("optimizer.learning_rate", 0.003, 0.0001)
    ]
    assert logged_steps(half)[16][2] != logged_steps(half)[15][2]
    train_here(recipe, half, tiny_data, *option, "--train.stop_at_step", "18")
    with pytest.raises(UsageError, match=r"the run has 0\.0001, asked for 0\.003"):
        train_here(recipe, half, tiny_data)


def test_an_override_makes_the_segment_approximate_and_compares_nothing(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    shutil.rmtree(half / "checkpoints" / "step-00000015")  # steps 11 to 15 will be run again
    option = ("--optimizer.learning_rate", "1e-4", "--train.stop_at_step", "17")
    train_here(recipe, half, tiny_data, *option, override=True)
    started = events(half, "segment_started")[-1]
    assert started["exactness"] == "approximate"
    assert started["reason"] == "overridden: optimizer.learning_rate"
    assert events(half, "replayed") == []


def test_what_was_logged_before_an_override_is_no_measure_for_what_comes_after(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    """A kill after the override: only the overridden steps are compared."""
    newer = half / "checkpoints" / "step-00000015"
    shutil.rmtree(newer)
    words = ("--optimizer.learning_rate", "1e-3")
    train_here(recipe, half, tiny_data, *words, "--train.stop_at_step", "12", override=True)
    shutil.rmtree(half / "checkpoints" / "step-00000012")
    train_here(recipe, half, tiny_data, *words)
    (replayed,) = events(half, "replayed")
    assert (replayed["compared"], replayed["equal"]) == (2, 2)


def test_an_override_that_fails_to_start_leaves_the_run_as_it_was(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    with pytest.raises(DataError, match="fewer than the"):
        train_here(recipe, half, tiny_data, "--train.global_batch_tokens", "8388608", override=True)
    assert events(half, "override") == []
    train_here(recipe, half, tiny_data)
    assert logged_steps(half) == logged_steps(finished)


def test_the_report_and_inspect_know_of_an_override(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    from milepost.cli.data import inspect
    from milepost.trajectory.collect import collect

    options = ("--run.seed", "7", "--train.stop_at_step", "17")
    train_here(recipe, half, tiny_data, *options, override=True)
    assert collect(half).manifest.config.run.seed == 7
    for step in (15, 17):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            inspect(half, step=step)
        assert "(equal to the logged one)" in shown.getvalue()


@pytest.mark.parametrize("what", ["torch", "milepost"])  # Milepost's own numbers moved before
def test_another_machine_or_version_since_the_checkpoint_makes_the_segment_approximate(
    recipe: Path, tiny_data: Path, half: Path, what: str
) -> None:
    log = half / "events.jsonl"
    log.write_text(log.read_text().replace(f'"{what}":"', f'"{what}":"1.'))
    for stop in ("16", "17"):  # the second comes after a segment on this machine
        train_here(recipe, half, tiny_data, "--train.stop_at_step", stop)
    first, second = events(half, "segment_started")[1:]
    assert first["exactness"] == "approximate"
    assert first["reason"].startswith(f"{what} was 1.")
    assert second["exactness"] == "exact", "its checkpoint was made on this machine"


@pytest.mark.parametrize("step", [0, 10, 30])
def test_a_run_stops_at_the_step_whose_validation_it_gives_up(
    step: int,
    recipe: Path,
    tiny_data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from milepost.train import watching

    run, scored = tmp_path / "run", watching.validate
    calls = iter([False] * (step // 10) + [True])

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if next(calls, False):
            os.kill(os.getpid(), signal.SIGTERM)
        return scored(*arguments, **named)

    monkeypatch.setattr(watching, "validate", interrupted)
    assert train_here(recipe, run, tiny_data)["status"] == "stopped"
    assert events(run, "segment_ended")[-1]["step"] == step
    assert [e["step"] for e in events(run, "validation")] == list(range(0, step, 10))
    assert train_here(recipe, run, tiny_data)["status"] == "done"
    expected = [(e["step"], e["loss_nats"]) for e in events(finished, "validation")]
    assert [(e["step"], e["loss_nats"]) for e in events(run, "validation")] == expected
    assert weights_sha256(run, 30) == weights_sha256(finished, 30)


def test_a_validation_that_was_given_up_is_made_up_for(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    train_here(recipe, half, tiny_data, "--train.stop_at_step", "20")
    log = half / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"kind":"validation"' not in line))
    train_here(recipe, half, tiny_data)
    made_up, last = events(half, "validation")
    expected = {e["step"]: e["loss_nats"] for e in events(finished, "validation")}
    assert (made_up["step"], made_up["loss_nats"]) == (20, expected[20])
    assert (last["step"], last["loss_nats"]) == (30, expected[30])
