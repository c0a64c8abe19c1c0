"""What the guards decide, what they remember, and what a history says of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from milepost.checkpoint.state import GuardNumbers, Progress, progress_from_plain
from milepost.config.recipe import config_from_toml, is_harmless
from milepost.config.schema import GuardsSection
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.spikes import MIN_HISTORY, robust_z
from milepost.runs.events import History, present_events
from milepost.runs.refusals import (
    Refusals,
    Rollback,
    refusals_from_plain,
    refusals_of,
)
from milepost.train.guards import (
    DRIFT_STEPS,
    ResumeDrift,
    Verdict,
    judge,
    recalled,
    rollback_step,
)
from tests.training import TINY_RECIPE

LEVEL = tuple(4.0 + 0.01 * (n % 7) for n in range(40))
"""Median 4.03, deviations of hundredths."""

HIGH = 9.0


def decide(
    loss: float = 4.0,
    norm: float = 1.0,
    *,
    losses: tuple[float, ...] = LEVEL,
    config: dict[str, Any] | None = None,
    **numbers: int,
) -> Verdict:
    before = GuardNumbers(losses=losses, **numbers)
    return judge(loss, norm, numbers=before, config=GuardsSection(**(config or {})))


def test_the_window_begins_where_values_can_be_judged() -> None:
    smallest = GuardsSection.model_fields["spike_window"].metadata[0].ge
    assert smallest == MIN_HISTORY


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1), (math.inf, 1), (4, math.nan), (4, -math.inf)]
)
def test_what_is_not_finite_is_skipped_until_the_tries_are_used_up(
    loss: float, norm: float
) -> None:
    for before in range(3):
        verdict = decide(loss, norm, skips_in_a_row=before, spikes_in_a_row=2)
        assert (verdict.action, verdict.why) == ("skip", "not finite")
        expected = GuardNumbers(LEVEL, skips_in_a_row=before + 1, spikes_in_a_row=2)
        assert verdict.numbers == expected, "the window is not poisoned"
    assert decide(loss, norm, skips_in_a_row=3).action == "stop"
    assert decide(loss, norm, config={"nonfinite": "stop"}).action == "stop"


def test_an_applied_update_ends_the_rows_and_enters_the_window() -> None:
    verdict = decide(4.02, skips_in_a_row=2, spikes_in_a_row=2, rollbacks=1)
    assert verdict.is_applied and not verdict.begins_spike
    assert verdict.numbers == GuardNumbers((*LEVEL, 4.02), rollbacks=1)


def test_the_window_keeps_the_last_losses_only() -> None:
    verdict = decide(4.0, config={"spike_window": 40})
    assert verdict.numbers.losses == (*LEVEL[1:], 4.0)
    shorter = decide(4.0, config={"spike_window": 20})
    assert shorter.numbers.losses == (*LEVEL[-19:], 4.0)
    assert shorter.z == robust_z(4.0, LEVEL[-20:])


@pytest.mark.parametrize(
    ("spike", "action"),
    [("off", "apply"), ("warn", "apply"), ("skip", "skip"), ("rollback", "apply")],
)
def test_a_spike_leads_to_what_the_recipe_says(spike: str, action: str) -> None:
    verdict = decide(HIGH, config={"spike": spike})
    assert verdict.action == action
    assert (verdict.why == "spike") == (spike != "off")
    assert verdict.begins_spike == (spike in ("warn", "rollback"))
    assert (HIGH in verdict.numbers.losses) == (action == "apply")


def test_a_spike_lies_above_the_limit_not_at_it() -> None:
    limit = robust_z(HIGH, LEVEL)
    assert decide(HIGH, config={"spike": "skip", "spike_z": limit}).action == "apply"
    just_below = math.nextafter(limit, 0.0)
    assert decide(HIGH, config={"spike": "skip", "spike_z": just_below}).action == "skip"


@pytest.mark.parametrize("known", [0, MIN_HISTORY - 1, MIN_HISTORY])
def test_a_loss_is_judged_when_enough_are_known(known: int) -> None:
    verdict = decide(HIGH, losses=LEVEL[:known], config={"spike": "skip"})
    assert (verdict.action == "skip") == (known == MIN_HISTORY)
    assert (verdict.z is not None) == (known == MIN_HISTORY)


def test_a_loss_that_falls_far_is_no_spike() -> None:
    assert decide(0.5, config={"spike": "skip"}).action == "apply"


def test_a_row_of_spikes_is_warned_of_once_and_rolled_back_when_patience_ends() -> None:
    config = {"spike": "rollback", "spike_patience": 3}
    first = decide(HIGH, config=config)
    second = decide(HIGH, config=config, spikes_in_a_row=1)
    third = decide(HIGH, config=config, spikes_in_a_row=2)
    assert [v.action for v in (first, second, third)] == ["apply", "apply", "roll_back"]
    assert [v.begins_spike for v in (first, second, third)] == [True, False, False]
    assert decide(HIGH, config=config, spikes_in_a_row=2, rollbacks=3).action == "stop"
    assert decide(4.0, config=config, spikes_in_a_row=2).numbers.spikes_in_a_row == 0


def test_batches_that_stay_infinite_lead_to_a_rollback_where_there_is_one() -> None:
    config = {"spike": "rollback"}
    assert decide(math.nan, config=config, skips_in_a_row=3).action == "roll_back"
    assert decide(math.nan, config=config, skips_in_a_row=3, rollbacks=3).action == "stop"


@pytest.mark.parametrize(
    ("step", "spikes", "why", "expected"),
    [
        (52, 2, "spike", 50),
        (51, 2, "spike", 40),  # the update to step 50 was the first that stood out
        (50, 0, "spike", 50),
        (59, 2, "spike", 50),
        (50, 0, "not finite", 40),  # what update 50 left is what is not finite
        (51, 0, "not finite", 50),
        (51, 2, "not finite", 40),
        (9, 2, "spike", 0),
        (0, 0, "not finite", 0),
    ],
)
def test_a_rollback_goes_to_the_last_scheduled_checkpoint_before_the_trouble(
    step: int, spikes: int, why: str, expected: int
) -> None:
    progress = Progress(step=step, guards=GuardNumbers(spikes_in_a_row=spikes))
    assert rollback_step(progress, why=why, every_steps=10, first_step=0) == expected


@pytest.mark.parametrize(("step", "expected"), [(47, 45), (52, 50), (51, 45)])
def test_a_rollback_never_goes_back_to_before_the_first_step_of_the_run(
    step: int, expected: int
) -> None:
    progress = Progress(step=step, guards=GuardNumbers(spikes_in_a_row=2))
    assert rollback_step(progress, why="spike", every_steps=10, first_step=45) == expected


def test_what_was_skipped_before_is_skipped_again_and_counted_the_same() -> None:
    refusals = Refusals(skips=frozenset([(31, 30), (31, 31), (40, 41)]))
    at = Progress(step=30, guards=GuardNumbers(LEVEL))
    found = recalled(at, refusals=refusals)
    assert found == replace(at, skipped=2, guards=GuardNumbers(LEVEL, skips_in_a_row=2))
    assert recalled(found, refusals=refusals) == found
    elsewhere = Progress(step=29)
    assert recalled(elsewhere, refusals=refusals) == elsewhere


def test_a_rollback_is_recalled_where_it_led_to_and_once() -> None:
    refusals = Refusals(rollbacks=(Rollback(20, skipped=7, rollbacks=2),))
    at = Progress(step=20, skipped=1, guards=GuardNumbers(LEVEL, 1, 1, rollbacks=1))
    found = recalled(at, refusals=refusals)
    assert found == replace(at, skipped=7, guards=GuardNumbers(LEVEL, rollbacks=2))
    assert recalled(found, refusals=refusals) == found, "a run that has it already goes on"
    assert recalled(replace(at, step=19), refusals=refusals).skipped == 1


def test_a_skip_right_after_a_rollback_is_recalled_with_it() -> None:
    refusals = Refusals(frozenset([(21, 27)]), (Rollback(20, skipped=7, rollbacks=1),))
    found = recalled(Progress(step=20), refusals=refusals)
    assert (found.skipped, found.guards.skips_in_a_row) == (8, 1)


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, **fields}


def skip(step: int, data_step: int) -> dict[str, Any]:
    return event("batch_skipped", step=step, data_step=data_step)


def back(to_step: int, skipped: int, rollbacks: int) -> dict[str, Any]:
    return event("rolled_back", to_step=to_step, skipped=skipped, rollbacks=rollbacks)


def of(*events: dict[str, Any]) -> Refusals:
    refusals = refusals_of(History(list(events), num_bad_lines=0))
    assert refusals_from_plain(refusals.as_plain()) == refusals
    return refusals


def test_a_rollback_forgets_the_skips_that_it_undid_and_earlier_rollbacks() -> None:
    found = of(skip(12, 11), skip(25, 25), back(30, 9, 1), skip(31, 40), back(20, 30, 2))
    assert found.skips == {(12, 11)}
    assert found.rollbacks == (Rollback(20, 30, 2),)
    assert found.is_rollback_open
    both = of(back(20, 9, 1), back(40, 12, 2))
    assert [r.to_step for r in both.rollbacks] == [20, 40]


def test_a_rollback_is_carried_out_when_a_step_was_trained_after_it() -> None:
    assert not of(back(20, 9, 1), event("step", step=21)).is_rollback_open
    assert of(event("step", step=21), back(20, 9, 1)).is_rollback_open


def test_a_changed_recipe_tries_skipped_batches_again_and_keeps_rollbacks() -> None:
    found = of(skip(12, 11), back(10, 5, 1), skip(11, 15), event("override", field="x"))
    assert found.skips == frozenset() and len(found.rollbacks) == 1


def test_lines_of_another_form_say_nothing() -> None:
    assert of(event("batch_skipped", step="3", data_step=1), event("rolled_back")) == Refusals()


def test_what_a_rollback_undid_is_not_present() -> None:
    events = [event("step", step=s, n=s) for s in (19, 20, 21, 22)]
    events += [event("validation", step=22), back(20, 3, 1), event("step", step=21, n="new")]
    assert [e.get("n") for e in present_events(events) if e["kind"] == "step"] == [19, 20, "new"]
    history = History(events, num_bad_lines=0)
    assert history.latest_by_step("step")[21]["n"] == "new"
    assert sorted(history.latest_by_step("step")) == [19, 20, 21]
    assert history.latest_by_step("validation") == {}


def drift(after: float, *, limit: float | None = 3.0, known: int = 40) -> list[float | None]:
    watch = ResumeDrift(LEVEL[:known], limit=limit)
    return [watch.add(after) for _ in range(DRIFT_STEPS + 5)]


def test_a_drift_after_a_resume_is_told_once_when_enough_steps_are_known() -> None:
    told = drift(4.6)
    assert told[DRIFT_STEPS - 1] == pytest.approx(robust_z(4.6, LEVEL))
    assert [z for place, z in enumerate(told) if place != DRIFT_STEPS - 1] == [None] * 24


@pytest.mark.parametrize(
    "quiet", [drift(4.04), drift(3.0), drift(9.0, limit=None), drift(9.0, known=19)]
)
def test_no_drift_is_told_of_what_goes_on_or_cannot_be_judged(quiet: list[float | None]) -> None:
    assert quiet == [None] * (DRIFT_STEPS + 5)


def test_one_high_loss_after_a_resume_is_no_drift() -> None:
    watch = ResumeDrift(LEVEL, limit=3.0)
    assert [watch.add(loss) for loss in (HIGH, *LEVEL[:25])] == [None] * 26


def test_a_train_state_from_before_there_were_guards_is_read_with_an_empty_memory() -> None:
    old = {
        "step": 30,
        "skipped": 0,
        "tokens_seen": 7680,
        "training_seconds": 1.5,
        "loss_scale": 1.0,
        "steps_at_scale": 0,
    }
    found = progress_from_plain(old, where="state.json")
    assert found == Progress(step=30, tokens_seen=7680, training_seconds=1.5)
    assert found.guards == GuardNumbers()


def test_the_memory_of_the_guards_is_read_back_to_the_last_bit() -> None:
    guards = GuardNumbers((1 / 3, 4.0, 5e-324), 1, 2, 3)
    plain = json.loads(json.dumps(Progress(step=3, guards=guards).as_plain()))
    assert progress_from_plain(plain, where="state.json") == Progress(step=3, guards=guards)


@pytest.mark.parametrize(
    "guards",
    [
        None,
        7,
        {"losses": None},
        {"losses": ["4"]},
        {"losses": [math.nan]},
        {"losses": [True]},
        {"rollbacks": -1},
        {"rollbacks": 1.5},
        {"skips_in_a_row": "1"},
        {"spike": 1},
    ],
)
def test_a_damaged_memory_is_refused(guards: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json"):
        progress_from_plain({"step": 3, "guards": guards}, where="state.json")


CONTRADICTIONS = [
    (("max_skips_in_a_row", "0"), "max_skips_in_a_row: 0 leaves nothing to guards.nonfinite"),
    (
        ("nonfinite", "stop", "spike", "skip", "max_skips_in_a_row", "0"),
        "max_skips_in_a_row: 0 leaves nothing to guards.spike",
    ),
    (("spike", "rollback", "max_rollbacks", "0"), "max_rollbacks: 0 leaves nothing to"),
    (("spike", "rollback", "spike_patience", "6"), "one every 5 steps"),
    (("spike", "rollback", "spike_window", "20", "every", "30"), "would undo up to 30 steps"),
    (
        ("spike", "rollback", "spike_window", "20", "spike_patience", "10", "every", "20"),
        "fill half of guards.spike_window",
    ),
    (("spike_window", "19"), "guards.spike_window: 19: "),
    (("spike_z", "3"), "guards.spike_z: 3"),
    (("spike", "ignore"), "guards.spike: 'ignore'"),
]


def as_options(fields: tuple[str, ...]) -> list[str]:
    names = {"every": "checkpoint.every_steps"}
    pairs = zip(fields[::2], fields[1::2], strict=True)
    return [w for name, value in pairs for w in (f"--{names.get(name, f'guards.{name}')}", value)]


@pytest.mark.parametrize(("fields", "message"), CONTRADICTIONS)
def test_guards_that_contradict_each_other_are_refused(
    fields: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        config_from_toml(TINY_RECIPE, overrides=as_options(fields), source="the tiny recipe")
    assert message in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        ("nonfinite", "stop", "max_skips_in_a_row", "0"),
        ("spike", "rollback", "spike_patience", "5"),
        ("spike", "rollback", "spike_window", "20", "spike_patience", "9", "every", "20"),
        ("max_rollbacks", "0"),
        ("resume_drift_z", "none"),
    ],
)
def test_guards_at_their_limits_are_taken(fields: tuple[str, ...]) -> None:
    config_from_toml(TINY_RECIPE, overrides=as_options(fields), source="the tiny recipe")


def test_the_interval_of_checkpoints_is_part_of_the_numbers_of_a_run_that_rolls_back() -> None:
    plain, back = (
        config_from_toml(TINY_RECIPE, overrides=["--guards.spike", spike], source="tiny")
        for spike in ("warn", "rollback")
    )
    assert is_harmless("checkpoint.every_steps", config=plain)
    assert not is_harmless("checkpoint.every_steps", config=back)
    assert is_harmless("checkpoint.keep_train_state", config=back)
    assert not is_harmless("guards.spike_z") and is_harmless("guards.resume_drift_z")
