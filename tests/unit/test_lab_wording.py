"""What the laboratory says, of results whose numbers are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from milepost.config.recipe import load_recipe
from milepost.experiments.lab.arms import Arm, all_arms
from milepost.experiments.lab.measures import Curve, measure, noise_of
from milepost.experiments.lab.page import render
from milepost.experiments.lab.results import ArmResult, Results, RunResult
from milepost.experiments.lab.setting import Setting
from milepost.experiments.lab.wording import answer, separated, table_of
from milepost.runs.metric_names import VAL_LOSS

STEPS = np.arange(0, 101, 5)
NOISE = 0.01 * (-1.0) ** np.arange(len(STEPS))
"""Neighbors differ by 0.02 up and down."""


def setting_of(folder: Path) -> Setting:
    config = load_recipe("lab", overrides=("--train.total_steps", "400"))
    return Setting(folder, "lab", config, at=100, steps_after=100, num_seeds=3)


def result(arm: Arm | None, seed: int, above: np.ndarray, *, equal: bool | None) -> RunResult:
    base = 4.0 - 0.001 * STEPS + NOISE + 0.1 * seed
    curve = Curve(STEPS, base + above)
    found = measure(curve, Curve(STEPS, base), width=1, noise=noise_of(base))
    assert found is not None
    measures = {} if arm is None else {VAL_LOSS: found}
    return RunResult(seed, arm, "done", 100, {VAL_LOSS: curve}, measures, equal)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    setting = setting_of(tmp_path)
    arms = {arm.name: arm for arm in all_arms(setting)}
    zero = np.zeros(len(STEPS))
    lost = np.where((STEPS > 0) & (STEPS <= 40), 0.5, 0.0)
    courses = {
        "full": [zero] * 3,
        "moments": [lost, 1.2 * lost, np.full(len(STEPS), 0.6) * (STEPS > 0)],
        "validation": [zero - 0.3] * 3,
        "authors": [lost - 0.3] * 3,
    }
    parents = {seed: result(None, seed, zero, equal=None) for seed in range(3)}
    found = [
        ArmResult(
            arms[name],
            [
                result(arms[name], seed, course, equal=True if name == "full" else None)
                for seed, course in enumerate(of_seeds)
            ],
        )
        for name, of_seeds in courses.items()
    ]
    return Results(setting, parents, found, [VAL_LOSS], num_runs=15, num_done=15)


def test_the_answer_is_three_sentences_with_their_numbers(results: Results) -> None:
    exact, moments, authors = answer(results)
    assert exact.startswith("A restart that restores everything costs nothing: 3 of 3 restarts")
    assert "+0.567 (95 %: 0.423 to 0.710) nats at the worst" in moments
    assert "back in the noise after 45 steps (1 of 3 not within 100)" in moments
    assert "the other text −0.300 from the checkpoint itself on" in authors
    assert authors.startswith("What the authors did moves the measured validation loss by +0.200")


def test_recovery_is_told_seed_by_seed_and_not_for_other_text(results: Results) -> None:
    rows = {row[0]: row for row in table_of(results, VAL_LOSS).rows}
    assert rows["Moments lost"][3] == "45, 45, never"
    assert rows["Full restore"][3] == "0, 0, 0"
    assert rows["Full restore"][5] == "3 of 3"
    assert rows["Other validation set"][3] == "–"
    apart = separated(results)
    assert apart is not None
    assert [row[0].splitlines()[0] for row in apart.rows] == [
        "Optimizer state",
        "Validation set",
        "State, schedule and set together",
    ]
    assert apart.rows[1][1] == "−0.300"


def test_what_is_not_exact_is_said_first(results: Results) -> None:
    full = results.arms[0]
    full.runs[1] = result(full.arm, 1, np.zeros(len(STEPS)), equal=False)
    assert answer(results)[0] == (
        "Only 2 of 3 restarts that restored everything had the parent's bits."
    )


def test_a_laboratory_of_which_nothing_is_done_has_a_page(tmp_path: Path) -> None:
    empty = Results(setting_of(tmp_path), {}, [], [], num_runs=33, num_done=0)
    page = render(empty, left_out={"lowbit": "torchao is not installed"})
    assert "There is no arm to compare yet." in page
    assert "0 of 33 runs are done" in page
    assert "The arm lowbit was left out: torchao is not installed." in page


def test_an_interval_that_holds_zero_is_no_effect(results: Results) -> None:
    moments = next(found for found in results.arms if found.arm.name == "moments")
    moments.runs[:] = [
        result(moments.arm, seed, np.where(STEPS > 80, shift, 0.0), equal=None)
        for seed, shift in enumerate((-0.02, 0.005, 0.01))
    ]
    told = answer(results)[1]
    assert told.startswith("Losing the optimizer's moments alone does not show")
    assert "which is within the noise" in told
    assert "at the end it stands −0.002 (95 %: −0.042 to 0.038, not told apart from zero)" in told


def test_an_arm_that_diverged_is_in_no_mean_and_is_said(results: Results) -> None:
    moments = next(found for found in results.arms if found.arm.name == "moments")
    moments.runs[2] = replace(moments.runs[2], status="diverged", measures={})
    told = answer(results)
    assert "+0.550" in told[1], "the mean of 0.5 and 0.6"
    assert told[-1] == (
        "Restarts that diverged: moments lost: 1 of 3 seeds. Means are of the others."
    )
    row = next(r for r in table_of(results, VAL_LOSS).rows if r[0].startswith("Moments"))
    assert row[0] == "Moments lost\n1 of 3 seeds diverged"
    assert row[3] == "45, 45, diverged"
    moments.runs[:] = [replace(run, status="diverged", measures={}) for run in moments.runs]
    render(results, left_out={})


def test_a_parent_that_diverged_is_said(results: Results) -> None:
    results.parents[1] = replace(results.parents[1], status="diverged")
    assert answer(results)[-1].startswith("The parent of seed 1 diverged itself")


def test_what_a_person_named_is_text_on_the_page(results: Results) -> None:
    named = replace(results, setting=replace(results.setting, name="<b>x</b>"))
    page = render(named, left_out={"ranks": "<i>y</i>"})
    assert "<b>x" not in page and "<i>y" not in page


def test_arms_whose_data_begin_anew_see_other_batches(tmp_path: Path) -> None:
    arms = all_arms(setting_of(tmp_path))
    assert {arm.name for arm in arms if arm.has_other_batches} == {"data", "restart"}
    assert {arm.name for arm in arms if arm.first_step(setting_of(tmp_path)) == 0} == {"restart"}
