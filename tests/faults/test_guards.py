"""Rows 16 to 18: bad batches, what the guards do, and kills meanwhile."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from milepost.cli.main import run as milepost
from milepost.core.errors import DivergedError
from milepost.data import loader
from milepost.train.guards import DRIFT_STEPS
from tests.faults.test_config_faults import check_finite_checkpoints
from tests.sabotage import Sabotage, burst
from tests.training import (
    Course,
    events,
    kill_group,
    logged_steps,
    train_here,
    wait_for_step,
    weights_sha256,
    write_recipe,
)

GUARDED = (
    *("--train.total_steps", "70", "--checkpoint.every_steps", "10"),
    *("--guards.spike_window", "20", "--checkpoint.keep_train_state", "1"),
)
BURST = (49, 50, 51)
"""The first of them makes update 50, after which there is a checkpoint."""


@contextlib.contextmanager
def burst_here(*data_steps: int) -> Iterator[None]:
    """As `burst`, in this process."""
    really = loader.Loader.batch

    def batch(self: loader.Loader, data_step: int) -> np.ndarray:
        rows = really(self, data_step)
        if data_step not in data_steps:
            return rows
        source = np.random.default_rng(data_step)
        return source.integers(0, 512, rows.shape).astype(np.uint32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader.Loader, "batch", batch)
        yield


@pytest.fixture(params=["rollback", "skip"])
def spiked(request: pytest.FixtureRequest) -> Course:
    """A run through a burst of random tokens, once with each way out of it."""
    return request.getfixturevalue(f"course_{request.param}")


@pytest.fixture(scope="session")
def course_rollback(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    return course_through_burst("rollback", data=tiny_data, tmp=tmp_path_factory)


@pytest.fixture(scope="session")
def course_skip(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    return course_through_burst("skip", data=tiny_data, tmp=tmp_path_factory)


def course_through_burst(spike: str, *, data: Path, tmp: pytest.TempPathFactory) -> Course:
    folder = tmp.mktemp(spike)
    words = (*GUARDED, "--guards.spike", spike)
    recipe = write_recipe(folder)
    with burst_here(*BURST):
        train_here(recipe, folder / "undisturbed", data, *words)
    return Course(recipe=recipe, data=data, words=words, undisturbed=folder / "undisturbed")


def used(run: Path) -> list[int]:
    """The data step of each step, in order of the steps."""
    steps = {event["step"]: event["data_step"] for event in events(run, "step")}
    return [steps[step] for step in sorted(steps)]


def test_a_burst_is_warned_of_once_and_trained_on_by_default(short: Course, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with burst_here(*BURST):
        train_here(short.recipe, run, short.data, *GUARDED)
    (warned,) = events(run, "guard_warned")
    assert (warned["guard"], warned["step"], warned["data_step"]) == ("spike", 50, 49)
    (step,) = [e for e in events(run, "step") if e["step"] == 50]
    assert warned["batch_sha256"] == step["batch_sha256"]
    assert warned["loss_nats"] == step["loss_nats"] and warned["z"] > 6
    assert used(run) == list(range(70))


def test_a_burst_that_is_skipped_is_recorded_and_never_trained_on(course_skip: Course) -> None:
    run = course_skip.undisturbed
    skipped = events(run, "batch_skipped")
    assert [(e["step"], e["data_step"], e["why"]) for e in skipped] == [
        (50, 49, "spike"),
        (50, 50, "spike"),
        (50, 51, "spike"),
    ]
    assert len({event["batch_sha256"] for event in skipped}) == 3
    assert used(run) == [*range(49), *range(52, 73)]


def test_a_rollback_is_recorded_and_leaves_out_the_data_up_to_the_last_bad_batch(
    course_rollback: Course,
) -> None:
    run = course_rollback.undisturbed
    (back,) = events(run, "rolled_back")
    assert (back["from_step"], back["to_step"], back["skipped"]) == (51, 40, 12)
    assert (back["first_data_step"], back["last_data_step"]) == (40, 51)
    assert (back["why"], back["rollbacks"]) == ("spike", 1)
    (aside,) = events(run, "checkpoint_quarantined")
    assert aside["step"] == 50 and "rollback to step 40" in aside["reason"]
    assert Path(aside["path"]).is_dir() and "quarantine" in aside["path"]
    assert used(run) == [*range(40), *range(52, 82)]


def test_a_resume_after_which_losses_lie_higher_is_warned_of_once(
    short: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_here(short.recipe, run, short.data, *GUARDED, "--train.stop_at_step", "40")
    with burst_here(*range(40, 70)):
        train_here(short.recipe, run, short.data, *GUARDED)
    (drift,) = [e for e in events(run, "guard_warned") if e["guard"] == "resume_drift"]
    assert drift["step"] == 40 + DRIFT_STEPS and drift["z"] > 3


def test_a_run_without_trouble_is_not_warned_of(plain: Course) -> None:
    kinds = ("guard_warned", "batch_skipped", "rolled_back", "guard_stopped")
    assert events(plain.undisturbed, *kinds) == []


def dying(place: str) -> tuple[str, str]:
    """SIGKILL at a moment of the rollback: (module, body)."""
    kill_in_events = """
really = module.EventWriter.{name}
def append(self, kind, **fields):
    {before}
    really(self, kind, **fields)
    {after}
module.EventWriter.{name} = append
"""
    now = "if kind == {kind!r} and {more} and is_once(once): die()"

    def events_module(kind: str, *, name: str, more: str = "True", is_before: bool = False) -> str:
        line = now.format(kind=kind, more=more)
        before, after = (line, "pass") if is_before else ("pass", line)
        return kill_in_events.format(name=name, before=before, after=after)

    moments = {
        "before the event": events_module("rolled_back", name="append_durably", is_before=True),
        "after the event": events_module("rolled_back", name="append_durably"),
        "a checkpoint moved": events_module(
            "checkpoint_quarantined", name="append", is_before=True
        ),
        "a first new step": events_module("step", name="append", more="fields['data_step'] == 52"),
        "steps later": events_module("step", name="append", more="fields['data_step'] == 58"),
        "the new checkpoint": events_module(
            "checkpoint_saved",
            name="append",
            more="any(e['kind'] == 'rolled_back' for e in module.read_history(self.path).events)",
            is_before=True,
        ),
    }
    return "milepost.runs.events", moments[place]


def go_on(course: Course, run: Path, *, ranks: str) -> None:
    """Trains to the end in processes, and holds the run against the undisturbed one."""
    done = course.train(run, "--ranks", ranks)
    assert done.returncode == 0, done.stderr
    course.check(run)


@pytest.mark.parametrize(
    ("place", "ranks"),
    [
        ("after the event", "2"),
        pytest.param("before the event", "1", marks=pytest.mark.long),
        pytest.param("after the event", "1", marks=pytest.mark.long),
        pytest.param("a checkpoint moved", "1", marks=pytest.mark.long),
        pytest.param("a first new step", "1", marks=pytest.mark.long),
        pytest.param("a first new step", "2", marks=pytest.mark.long),
        pytest.param("steps later", "1", marks=pytest.mark.long),
        pytest.param("the new checkpoint", "1", marks=pytest.mark.long),
    ],
)
def test_a_kill_at_any_moment_of_a_rollback_leaves_the_same_run(
    place: str, ranks: str, course_rollback: Course, tmp_path: Path, sabotage: Sabotage
) -> None:
    run = tmp_path / "run"
    sabotage.patch("milepost.data.loader", burst(*BURST))
    sabotage.patch(*dying(place))
    killed = course_rollback.train(run, "--ranks", ranks)
    assert "was ended by SIGKILL" in killed.stderr, killed.stderr
    go_on(course_rollback, run, ranks=ranks)
    assert len(events(run, "rolled_back")) == 1


@pytest.mark.parametrize(
    "stop_at",
    ["45", pytest.param("50", marks=pytest.mark.long), pytest.param("52", marks=pytest.mark.long)],
)
def test_stops_around_a_burst_leave_the_same_run(
    stop_at: str, spiked: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with burst_here(*BURST):
        spiked.train_here(run, "--train.stop_at_step", stop_at)
        spiked.train_here(run)
    spiked.check(run)


def test_a_damaged_checkpoint_after_a_rollback_leads_to_the_same_run_from_an_older_one(
    course_rollback: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with burst_here(*BURST):
        course_rollback.train_here(run, "--train.stop_at_step", "43")
        assert [e["to_step"] for e in events(run, "rolled_back")] == []
        course_rollback.train_here(run, "--train.stop_at_step", "55")
        assert used(run)[-1] == 66
        for step in (55, 50):  # of the present course
            damaged = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-1])
        course_rollback.train_here(run)
    course_rollback.check(run)


def test_rollbacks_are_bounded_and_the_run_stops_with_the_same_words_however_often(
    course_rollback: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with burst_here(*range(49, 400)):
        for _ in range(2):
            with pytest.raises(DivergedError, match="after 2 rollbacks") as caught:
                course_rollback.train_here(run, "--guards.max_rollbacks", "2")
    assert caught.value.message.startswith("step 4") and "robust deviations" in caught.value.message
    assert [e["rollbacks"] for e in events(run, "rolled_back")] == [1, 2]
    stops = events(run, "guard_stopped")
    assert len(stops) == 2 and stops[0]["guard"] == "spike"
    assert {k: v for k, v in stops[0].items() if k not in ("time", "segment")} == {
        k: v for k, v in stops[1].items() if k not in ("time", "segment")
    }
    assert [e["reason"] for e in events(run, "segment_ended")] == ["diverged"] * 2


def test_a_rollback_whose_train_state_is_gone_stops_the_run_and_says_so(
    course_rollback: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with burst_here(*BURST):
        course_rollback.train_here(run, "--train.stop_at_step", "45")
        shutil.rmtree(run / "checkpoints" / "step-00000040" / "train_state")
        with pytest.raises(DivergedError, match="step 40 has no train state to roll back to"):
            course_rollback.train_here(run)
    assert events(run, "rolled_back") == []
    assert events(run, "guard_stopped")[-1]["step"] == 52


@pytest.mark.long
def test_where_a_rollback_cannot_be_made_two_ranks_end_together_and_say_it_once(
    course_rollback: Course, tmp_path: Path, sabotage: Sabotage
) -> None:
    run = tmp_path / "run"
    with burst_here(*BURST):
        course_rollback.train_here(run, "--train.stop_at_step", "45")
    shutil.rmtree(run / "checkpoints" / "step-00000040" / "train_state")
    sabotage.patch("milepost.data.loader", burst(*BURST))
    done = course_rollback.train(run, "--ranks", "2")
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "step 40 has no train state to roll back to" in done.stderr
    assert len(events(run, "guard_stopped")) == 1


@pytest.mark.parametrize("spike", ["skip", "rollback"])
def test_a_replay_over_what_was_left_out_gives_the_same_bits(
    spike: str, short: Course, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = (*GUARDED, "--guards.spike", spike, "--train.stop_at_step", "60")
    with burst_here(*BURST):
        train_here(
            *(short.recipe, run, short.data, *words),
            *("--checkpoint.keep_train_state_every_steps", "10"),
        )
    # The processes of the replay read the shards as they are: what was left out is not looked at.
    assert milepost(["verify", str(run), "--replay", "--from-step", "40", "--ranks", "1"]) == 0
    assert "EQUAL: 10 of 10 steps, 21 of 21 weight tensors" in capsys.readouterr().out


NAN_IN_THE_LAST_RANK = """
really = module.LaneGradients.sum_all
count = [0]
def sum_all(self, *, world):
    count[0] += 1
    if count[0] == 31 and world.rank == world.size - 1 and is_once(once):
        self._summed[-1][1][7] = float("nan")
    return really(self, world=world)
module.LaneGradients.sum_all = sum_all
"""


@pytest.mark.parametrize("ranks", ["2", pytest.param("1", marks=pytest.mark.long)])
def test_one_infinite_gradient_of_one_rank_is_skipped_by_all_and_stays_skipped_after_a_kill(
    ranks: str, plain: Course, tmp_path: Path, sabotage: Sabotage
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ("--train.total_steps", "60", "--ranks", ranks)
    sabotage.patch("milepost.train.gradients", NAN_IN_THE_LAST_RANK)
    process = plain.start(run, *words)
    wait_for_step(run, 36)
    kill_group(process)  # step 31 is run again, and the fault does not come back
    done = plain.train(run, *words)
    assert done.returncode == 0, done.stderr
    assert "step 31: 1 batch is skipped as logged before" in done.stderr
    (skipped,) = events(run, "batch_skipped")
    assert (skipped["step"], skipped["data_step"], skipped["grad_norm"]) == (31, 30, None)
    assert used(run) == [*range(30), *range(31, 61)]
    plant_skip(plain, whole, words=words[:2])
    assert logged_steps(run) == logged_steps(whole)
    assert weights_sha256(run, 60) == weights_sha256(whole, 60)


def plant_skip(course: Course, run: Path, *, words: tuple[str, ...]) -> None:
    """A run whose batch 30 was never looked at: the history says before that it is skipped."""
    course.train_here(run, *words, "--train.stop_at_step", "30")
    line = {"v": 1, "kind": "batch_skipped", "segment": 1, "step": 31, "data_step": 30}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    course.train_here(run, *words)


def test_a_learning_rate_that_diverges_is_tried_on_three_more_batches_and_rolls_back_in_bounds(
    short: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("--optimizer.learning_rate", "1e30", "--guards.spike", "rollback")
    with pytest.raises(DivergedError, match="3 batches skipped in a row and 3 rollbacks"):
        short.train_here(run, *words)
    assert [e["to_step"] for e in events(run, "rolled_back")] == [0, 0, 0]
    assert len(events(run, "batch_skipped")) == 12
    assert check_finite_checkpoints(run) == 0
