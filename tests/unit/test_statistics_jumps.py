"""Jumps of a run's loss and norm, tied to its restarts and its data."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from milepost.runs.metric_names import GRAD_NORM, TRAIN_LOSS, VAL_LOSS
from milepost.trajectory.collect import collect
from milepost.trajectory.jumps import NEAR_STEPS, Jump, jumps_of
from tests.made_runs import MadeRun, make_killed_and_resumed_run, make_run


def train(made: MadeRun, first: int, last: int, *, up: dict[int, float] | None = None) -> None:
    """Steps of a calm run; `up` adds to the loss of a step and to four times its norm."""
    for step in range(first, last + 1):
        rng, more = random.Random(step), (up or {}).get(step, 0.0)
        fields = {
            "step": step,
            "data_step": step - 1,
            "loss_nats": 3.0 - step / 10_000 + rng.gauss(0, 0.02) + more,
            "grad_norm": 0.5 + rng.gauss(0, 0.02) + 4 * more,
            "batch_sha256": f"{step:064x}",
        }
        made.append("step", **fields)


def validate(made: MadeRun, step: int, loss: float) -> None:
    made.append("validation", step=step, loss_nats=loss, bits_per_byte=1.0, tokens=10, seconds=1.0)


def jumps(made: MadeRun) -> list[Jump]:
    return jumps_of(collect(made.layout.root))


def of_metric(found: list[Jump], metric: str) -> Jump:
    (jump,) = [jump for jump in found if jump.metric == metric]
    return jump


def run_with(folder: Path, up: dict[int, float], **resumed: Any) -> MadeRun:
    """1,000 steps, resumed at 500."""
    made = make_run(folder)
    made.start()
    train(made, 1, 500, up=up)
    made.start(restored_step=500, **resumed)
    train(made, 501, 1000, up=up)
    return made


def test_a_calm_run_has_none(tmp_path: Path) -> None:
    assert jumps(run_with(tmp_path, {})) == []
    assert jumps(make_killed_and_resumed_run(tmp_path / "other")) == []


def test_a_jump_far_from_a_restart_is_tied_to_its_data(tmp_path: Path) -> None:
    found = jumps(run_with(tmp_path, {300: 0.8, 301: 1.2, 302: 0.4}))
    loss, norm = of_metric(found, TRAIN_LOSS), of_metric(found, GRAD_NORM)
    assert [loss.step, loss.data_step, loss.segment] == [300, 299, 1]
    assert loss.batch_sha256 == f"{300:064x}"
    assert loss.height == pytest.approx(1.2, abs=0.1)  # of the highest step
    assert loss.steps_to_recovery == 3
    assert loss.cause == "no restart near: data step 299, batch 00000000"
    assert norm.step == 300 and norm.height == pytest.approx(4.8, abs=0.1)


def test_a_jump_after_a_resume_is_told_with_it(tmp_path: Path) -> None:
    found = jumps(run_with(tmp_path, {512: 1.0}, restored="weights", ranks=1))
    loss = of_metric(found, TRAIN_LOSS)
    assert loss.segment == 2
    assert loss.cause == (
        "12 steps after the resume at 500 that restored weights only, on 1 rank in place of 2"
    )


def test_a_changed_setting_is_named_unless_it_cannot_matter(tmp_path: Path) -> None:
    changed = [
        {"field": "optimizer.learning_rate", "old": 1e-3, "new": 1e-2},
        {"field": "train.stop_at_step", "old": None, "new": 7},
        "not a change",
    ]
    found = jumps(run_with(tmp_path, {501: 1.0}, changed=changed, device="another"))
    assert of_metric(found, TRAIN_LOSS).cause == (
        "1 step after the resume at 500 that restored everything, on another in place of cpu,"
        " with optimizer.learning_rate changed"
    )


@pytest.mark.parametrize(("steps", "is_near"), [(NEAR_STEPS, True), (NEAR_STEPS + 1, False)])
def test_near_ends_where_it_says(tmp_path: Path, steps: int, is_near: bool) -> None:
    jump = of_metric(jumps(run_with(tmp_path, {500 + steps: 1.0})), TRAIN_LOSS)
    assert ("the resume at 500" in jump.cause) is is_near


def test_an_exact_replay_is_told_so_that_the_resume_is_not_blamed(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    made.start()
    train(made, 1, 510)
    made.start(restored_step=500)
    train(made, 501, 1000, up={540: 1.0})
    cause = of_metric(jumps(made), TRAIN_LOSS).cause
    assert cause.endswith("that restored everything (10 of 10 steps run again were equal)")


def test_warm_up_is_told(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    made.start()
    train(made, 1, 200, up={40: 1.0})
    assert of_metric(jumps(made), TRAIN_LOSS).cause == "in warm-up, which ends at 50"


def test_a_step_without_a_batch_on_record_says_so(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    made.start()
    for step in range(1, 201):
        made.append("step", step=step, loss_nats=3 + step % 7 / 100 + (step == 150))
    (jump,) = jumps(made)
    assert (jump.data_step, jump.batch_sha256, jump.steps_to_recovery) == (None, None, 1)
    assert jump.cause == "no restart near; the batch is not on record"


def test_a_shift_of_the_validation_loss_over_a_resume_is_found(tmp_path: Path) -> None:
    made = run_with(tmp_path, {}, restored="weights")
    for step in range(0, 1001, 50):
        shift = 0.3 * (500 < step < 800)
        validate(made, step, 3.0 - step / 5000 + random.Random(step).gauss(0, 0.002) + shift)
    jump = of_metric(jumps(made), VAL_LOSS)
    assert (jump.step, jump.steps_to_recovery, jump.data_step) == (550, 250, None)
    assert jump.height == pytest.approx(0.29, abs=0.02)
    assert jump.cause == "50 steps after the resume at 500 that restored weights only"


def test_a_validation_loss_that_goes_on_has_no_shift(tmp_path: Path) -> None:
    made = run_with(tmp_path, {})
    for step in range(0, 1001, 50):
        validate(made, step, 3.0 - step / 5000 + random.Random(step).gauss(0, 0.002))
    assert jumps(made) == []


def test_the_largest_comes_first_and_the_loss_before_its_norm(tmp_path: Path) -> None:
    found = jumps(run_with(tmp_path, {200: 0.5, 400: 2.0, 700: 1.0}))
    places = [(jump.step, jump.metric) for jump in found]
    assert places == [(s, m) for s in (400, 700, 200) for m in (TRAIN_LOSS, GRAD_NORM)]


def test_foreign_fields_of_a_segment_are_no_error(tmp_path: Path) -> None:
    found = jumps(run_with(tmp_path, {505: 1.0}, changed=7, ranks="two", device=None, restored=3))
    assert of_metric(found, TRAIN_LOSS).cause == "5 steps after the resume at 500"


def fall(made: MadeRun, first: int, last: int, *, up: float = 0.0, seed: int = 0) -> None:
    """Steps of a run that still learns fast, as after a warm-up."""
    for step in range(first, last + 1):
        noise = random.Random(f"{seed}/{step}").gauss(0, 0.05)
        loss = 3.0 + 7.0 * math.exp(-step / 120) + noise + up * math.exp(-(step - first) / 10)
        made.append("step", step=step, data_step=step - 1, loss_nats=loss, grad_norm=1.0)


def test_a_shift_over_a_resume_is_found_while_the_loss_falls_fast(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    made.start()
    fall(made, 1, 150)
    made.start(restored_step=150, restored="weights")
    fall(made, 151, 300, up=1.5)
    jump = of_metric(jumps(made), TRAIN_LOSS)
    assert jump.step == 151 and 0.5 < jump.height < 1.5
    assert jump.cause == "1 step after the resume at 150 that restored weights only"
    assert jump.steps_to_recovery is not None and 5 <= jump.steps_to_recovery <= 40


def test_exact_resumes_of_falling_losses_are_not_called_shifts(tmp_path: Path) -> None:
    num_found = 0
    for seed in range(40):
        made = make_run(tmp_path / str(seed))
        made.start()
        fall(made, 1, 150, seed=seed)
        made.start(restored_step=150)
        fall(made, 151, 200, seed=seed)
        num_found += sum(jump.metric == TRAIN_LOSS for jump in jumps(made))
    assert num_found <= 1
