"""What trackers are told of a run's events, and how they are chosen."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from milepost.config.recipe import config_from_toml, is_harmless
from milepost.core.errors import UsageError
from milepost.runs.events import Event
from milepost.train.tracked_events import TrackedEvents, metrics_of
from milepost.train.trackers import check_trackers
from milepost.train.tracking import _environment
from tests.training import TINY_RECIPE


@dataclass
class Notebook:
    """A tracker that keeps what it is told, later entries in place of earlier ones if it can."""

    can_rewind: bool = False
    destination: str = "notebook"
    notice: str = ""
    rows: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def log(
        self, metrics: Mapping[str, float], *, step: int, unix_seconds: float, row: int
    ) -> None:
        self.rows.append((row, step, dict(metrics)))
        self.times.append(unix_seconds)

    def rewind(self, step: int) -> None:
        if self.can_rewind:
            self.rows = [row for row in self.rows if row[1] < step]

    def flush(self) -> None: ...

    def finish(self) -> None: ...

    @property
    def losses(self) -> list[tuple[int, float]]:
        return [(step, m["train/loss"]) for _, step, m in self.rows if "train/loss" in m]


def event(kind: str, **fields: Any) -> Event:
    return {"v": 1, "kind": kind, "time": "2026-01-02T03:04:05.678Z", "segment": 1, **fields}


def step(number: int, loss: float) -> Event:
    return event("step", step=number, loss_nats=loss)


def started(restored: int | None, *, exactness: str = "exact") -> Event:
    return event("segment_started", restored_step=restored, exactness=exactness)


def told(events: list[Event], tracker: Notebook, *, every_steps: int = 1) -> Notebook:
    tracked = TrackedEvents(tracker, every_steps=every_steps, num_rows=0)
    for each in events:
        tracked.tell(each)
    return tracker


def test_a_step_becomes_metrics_with_the_names_that_users_expect() -> None:
    found = metrics_of(
        event("step", step=3, loss_nats=2.5, grad_norm=1, learning_rate=1e-3, data_step=2)
        | {"tokens_per_second": 10.0, "step_seconds": 0.5, "mfu_fraction": 0.25}
    )
    assert found == {
        "train/loss": 2.5,
        "train/grad_norm": 1.0,
        "train/learning_rate": 1e-3,
        "perf/tokens_per_second": 10.0,
        "perf/step_seconds": 0.5,
        "perf/mfu_fraction": 0.25,
    }


@pytest.mark.parametrize("absent", [None, float("nan"), float("inf"), True, "2.5"])
def test_what_is_no_finite_number_is_left_out(absent: Any) -> None:
    assert metrics_of(event("step", step=1, loss_nats=2.0, mfu_fraction=absent)) == {
        "train/loss": 2.0
    }


def test_validation_and_scores_become_metrics_and_other_events_do_not() -> None:
    validation = event("validation", step=5, loss_nats=3.0, bits_per_byte=None, tokens=9)
    assert metrics_of(validation) == {"val/loss": 3.0}
    metrics = {"acc": {"value": 0.5, "stderr": 0.1}, "acc_norm": {"value": 0.25, "stderr": None}}
    evaluation = event("evaluation", step=5, benchmark="hellaswag", metrics=metrics)
    assert metrics_of(evaluation) == {"eval/hellaswag/acc": 0.5, "eval/hellaswag/acc_norm": 0.25}
    assert metrics_of(event("checkpoint_saved", step=5, bytes=7, seconds=1.0)) == {}


def test_a_metric_carries_the_time_at_which_it_was_measured() -> None:
    (seconds,) = told([step(1, 2.0)], Notebook()).times
    assert seconds == pytest.approx(1767323045.678, abs=1e-3)


REPLAYED = [started(None), step(1, 3.0), step(2, 2.0), started(1), step(2, 2.0), step(3, 1.0)]


def test_steps_that_are_run_again_are_sent_once() -> None:
    assert told(REPLAYED, Notebook()).rows == [
        (0, 1, {"train/loss": 3.0}),
        (1, 2, {"train/loss": 2.0}),
        (2, 3, {"train/loss": 1.0}),
    ]


DIFFERENT = [*REPLAYED[:3], started(1, exactness="approximate"), step(2, 1.5), step(3, 1.0)]


def test_steps_that_may_differ_when_they_are_run_again_are_sent_again() -> None:
    assert told(DIFFERENT, Notebook()).losses == [(1, 3.0), (2, 2.0), (2, 1.5), (3, 1.0)]


def test_a_tracker_that_can_take_back_keeps_the_later_of_two_that_differ() -> None:
    assert told(DIFFERENT, Notebook(can_rewind=True)).losses == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_steps_that_a_rollback_undid_are_taken_back_and_told_anew() -> None:
    back = event("rolled_back", to_step=1, from_step=2)
    events = [*REPLAYED[:3], back, step(2, 1.5), started(1), step(2, 1.5)]
    assert told(events, Notebook(can_rewind=True)).losses == [(1, 3.0), (2, 1.5)]
    assert told(events, Notebook()).losses == [(1, 3.0), (2, 2.0), (2, 1.5)]


def test_a_validation_that_is_not_repeated_stays_though_steps_are_run_again() -> None:
    validation = event("validation", step=2, loss_nats=4.0)
    events = [*REPLAYED[:3], validation, *REPLAYED[3:]]
    assert (2, 2, {"val/loss": 4.0}) in told(events, Notebook(can_rewind=True)).rows


def test_a_run_that_begins_again_from_its_first_step_takes_all_of_it_back() -> None:
    events = [started(None), step(1, 3.0), started(None, exactness="approximate"), step(1, 2.0)]
    assert told(events, Notebook(can_rewind=True)).losses == [(1, 2.0)]


def test_a_score_that_is_made_up_for_is_sent_though_later_steps_were() -> None:
    score = event("evaluation", step=1, benchmark="piqa", metrics={"acc": {"value": 0.5}})
    tracker = told([started(None), step(1, 3.0), step(2, 2.0), started(1), score], Notebook())
    assert tracker.rows[-1] == (2, 1, {"eval/piqa/acc": 0.5})


@pytest.mark.parametrize("line", [{}, {"kind": "step"}, {"kind": "step", "loss_nats": 2.0}])
def test_a_foreign_line_of_the_history_is_passed_over(line: Event) -> None:
    assert told([step(1, 3.0), line, step(2, 2.5)], Notebook()).losses == [(1, 3.0), (2, 2.5)]


def test_two_benchmarks_of_one_step_are_two_rows() -> None:
    scores = [
        event("evaluation", step=1, benchmark=name, metrics={"acc": {"value": 0.5}})
        for name in ("piqa", "boolq", "piqa")
    ]
    names = [list(metrics) for _, _, metrics in told(scores, Notebook()).rows]
    assert names == [["eval/piqa/acc"], ["eval/boolq/acc"]]


def test_only_steps_are_thinned() -> None:
    events = [step(n, 1.0 * n) for n in range(1, 5)]
    events += [event("validation", step=3, loss_nats=9.0)]
    tracker = told(events, Notebook(), every_steps=2)
    assert [(row, s) for row, s, _ in tracker.rows] == [(0, 2), (1, 4), (2, 3)]


def test_the_next_segment_goes_on_where_the_last_one_ended() -> None:
    tracker = Notebook()
    tracked = TrackedEvents(tracker, every_steps=1, num_rows=2)
    for each in REPLAYED[:3]:
        tracked.remember(each)
    for each in REPLAYED[3:]:
        tracked.tell(each)
    assert tracker.rows == [(2, 3, {"train/loss": 1.0})]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ('["wandb", "trackio"]', ("wandb", "trackio")),
        ("wandb", ("wandb",)),
        ("tensorboard, wandb,wandb", ("tensorboard", "wandb")),
        ("none", ()),
        ("[]", ()),
    ],
)
def test_tools_are_a_list_or_names_with_commas(given: str, taken: tuple[str, ...]) -> None:
    config = config_from_toml(TINY_RECIPE, overrides=("--tracking.tools", given), source="test")
    assert config.tracking.tools == taken


def test_an_unknown_tool_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"tracking\.tools: 'mlflow'(.|\n)*tensorboard, trackio"):
        config_from_toml(TINY_RECIPE, overrides=("--tracking.tools", "mlflow"), source="test")


def test_tracking_can_change_from_segment_to_segment() -> None:
    names = ("tools", "project", "mode", "every_steps")
    assert all(is_harmless(f"tracking.{name}") for name in names)


def test_a_missing_package_is_said_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    check_trackers(("tensorboard", "trackio"))
    with pytest.raises(UsageError, match="not installed: wandb") as caught:
        check_trackers(("tensorboard", "wandb"))
    assert caught.value.hint is not None and "pip install 'milepost[trackers]'" in caught.value.hint


def test_offline_no_variable_of_the_user_leads_away_from_this_machine() -> None:
    ours = {"TRACKIO_SPACE_ID": "me/space", "WANDB_MODE": "online", "HOME": "/home/me"}
    assert _environment(ours, mode="online") == ours
    offline = _environment(ours, mode="offline")
    assert "TRACKIO_SPACE_ID" not in offline
    assert (offline["WANDB_MODE"], offline["HOME"]) == ("offline", "/home/me")


def test_the_process_of_a_tracker_imports_no_torch() -> None:
    code = "import sys, milepost.train.tracking_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
