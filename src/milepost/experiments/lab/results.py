"""What the laboratory's runs show so far: their curves, measured against the parents'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.checkpoint.store import MODEL_FILE, read_checkpoint_manifest
from milepost.core.errors import CheckpointError, StorageError
from milepost.experiments.lab.arms import Arm
from milepost.experiments.lab.measures import (
    Curve,
    Mean,
    Measure,
    mean_of,
    measure,
    noise_between,
)
from milepost.experiments.lab.running import Job, jobs_of, status_of
from milepost.experiments.lab.setting import PARENT, Setting
from milepost.runs.events import History, read_history
from milepost.runs.layout import RunLayout
from milepost.runs.metric_names import (
    GRAD_NORM,
    TRAIN_LOSS,
    VAL_LOSS,
    benchmark_metric,
)
from milepost.train.replay import COMPARED
from milepost.trajectory.fields import finite

STEP_WIDTH = 5
"""Training loss and gradient norm are means of so many steps, validation and scores as they are."""

METRICS = (VAL_LOSS, TRAIN_LOSS, GRAD_NORM)


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes:
        arm: None for the parent.
        status: see `running.status_of`.
        last_step: updates after the restart that are logged.
        curves: by metric; higher is worse in all of them, scores are errors.
        measures: against the parent; empty for the parent itself, and for an arm that diverged:
            what it had before is no measure of it.
        has_parents_bits: whether log and weights are the parent's, bit for bit; None where they
            need not be.
    """

    seed: int
    arm: Arm | None
    status: str
    last_step: int
    curves: dict[str, Curve]
    measures: dict[str, Measure]
    has_parents_bits: bool | None


@dataclass(frozen=True)
class ArmResult:
    """One arm over all seeds that have been trained."""

    arm: Arm
    runs: list[RunResult]

    def measures(self, metric: str) -> list[Measure]:
        """Of the seeds that have one."""
        return [run.measures[metric] for run in self.runs if metric in run.measures]

    def spike(self, metric: str) -> Mean | None:
        """Mean of the highest differences."""
        return _mean([found.spike for found in self.measures(metric)])

    def start(self, metric: str) -> Mean | None:
        """Mean of the first differences."""
        return _mean([found.start for found in self.measures(metric)])

    def end(self, metric: str) -> Mean | None:
        """Mean of the differences at the end."""
        return _mean([found.end for found in self.measures(metric)])

    def spike_z(self, metric: str) -> float | None:
        """Mean of the highest differences in deviations of the noise; None without noise."""
        found = [one.spike_z for one in self.measures(metric) if one.spike_z is not None]
        return sum(found) / len(found) if found else None

    @property
    def num_diverged(self) -> int:
        """Seeds that diverged."""
        return sum(run.status == "diverged" for run in self.runs)


@dataclass(frozen=True)
class Results:
    """All that the laboratory has so far.

    Attributes:
        parents: by seed; those of all seeds that were asked for and have begun.
        arms: in their order; those with at least one run that is done or diverged.
        metrics: that any parent has, the validation loss first.
        num_runs, num_done: of the laboratory as it was asked for; without the arms of a parent
            that diverged, which nothing can be measured against.
    """

    setting: Setting
    parents: dict[int, RunResult]
    arms: list[ArmResult]
    metrics: list[str]
    num_runs: int
    num_done: int

    @property
    def lost_seeds(self) -> list[int]:
        """Seeds whose parent diverged."""
        return [seed for seed, run in self.parents.items() if run.status == "diverged"]

    def of(self, name: str) -> ArmResult | None:
        """The arm of that name; None where nothing of it is there."""
        return next((found for found in self.arms if found.arm.name == name), None)


def collect_results(setting: Setting, arms: Sequence[Arm]) -> Results:
    """Reads every run of the laboratory that is done, or diverged.

    Raises:
        StorageError: a history cannot be read.
    """
    parents: dict[int, RunResult] = {}
    by_arm: dict[str, list[RunResult]] = {arm.name: [] for arm in arms}
    num_done, num_runs = 0, setting.num_seeds * (1 + len(arms))
    for seed in setting.seeds:
        parent_job, *arm_jobs = jobs_of(setting, arms, seed=seed)
        parent = _read(parent_job, setting, parent=None)
        if parent is None:
            continue
        parents[seed] = parent
        num_done += 1
        if parent.status == "diverged":
            num_runs -= len(arms)
            continue
        for job in arm_jobs:
            if (result := _read(job, setting, parent=parent)) is not None:
                by_arm[job.name].append(result)
                num_done += 1
    found = [ArmResult(arm, by_arm[arm.name]) for arm in arms if by_arm[arm.name]]
    known = {name for parent in parents.values() for name in parent.curves}
    metrics = [*(name for name in METRICS if name in known), *sorted(known - set(METRICS))]
    return Results(setting, parents, found, metrics, num_runs, num_done)


def width_of(metric: str) -> int:
    """Steps that a metric's curve is averaged over."""
    return STEP_WIDTH if metric in (TRAIN_LOSS, GRAD_NORM) else 1


def _mean(values: list[float]) -> Mean | None:
    return mean_of(values) if values else None


def _read(job: Job, setting: Setting, *, parent: RunResult | None) -> RunResult | None:
    """A run that is over; None for one that is not."""
    status, last = status_of(job)
    if status not in ("done", "diverged"):
        return None
    # What the parent calls the step of the restart is another step to an arm that counts anew.
    begin = setting.at if job.arm is None else job.first_step
    history = read_history(RunLayout(job.run).events)
    curves = _curves(history, begin=begin)
    measures: dict[str, Measure] = {}
    if job.arm is not None and parent is not None and status == "done":
        for name, curve in curves.items():
            if name in parent.curves:
                theirs, width = parent.curves[name], width_of(name)
                noise = noise_between(theirs, width=width, are_apart=job.arm.has_other_batches)
                found = measure(curve, theirs, width=width, noise=noise)
                measures |= {} if found is None else {name: found}
    equal = None
    if job.arm is not None and job.arm.keeps_bits:
        equal = status == "done" and _has_parents_bits(job, setting, history=history)
    return RunResult(job.seed, job.arm, status, last - begin, curves, measures, equal)


def _curves(history: History, *, begin: int) -> dict[str, Curve]:
    """The curves of a run from its restart on, by updates after it."""
    steps = history.latest_by_step("step")
    points: dict[str, dict[int, float]] = {
        TRAIN_LOSS: _points(steps, "loss_nats"),
        GRAD_NORM: _points(steps, "grad_norm"),
        VAL_LOSS: _points(history.latest_by_step("validation"), "loss_nats"),
    }
    for event in history.of_kind("evaluation"):
        scores = event.get("metrics") or {}
        score = finite((scores.get("acc_norm") or scores.get("acc") or {}).get("value"))
        step = event.get("step")
        if score is not None and isinstance(step, int):
            name = benchmark_metric(str(event.get("benchmark")), "error")
            points.setdefault(name, {})[step] = 1.0 - score
    first = {TRAIN_LOSS: begin + 1, GRAD_NORM: begin + 1}
    return {
        name: _curve(values, begin=begin, first=first.get(name, begin))
        for name, values in points.items()
        if any(step >= first.get(name, begin) for step in values)
    }


def _points(events: dict[int, dict[str, Any]], field: str) -> dict[int, float]:
    found = {step: finite(event.get(field)) for step, event in events.items()}
    return {step: value for step, value in found.items() if value is not None}


def _curve(values: dict[int, float], *, begin: int, first: int) -> Curve:
    steps = np.array(sorted(step for step in values if step >= first), dtype=np.int64)
    return Curve(steps - begin, np.array([values[int(step)] for step in steps], dtype=np.float64))


def _has_parents_bits(job: Job, setting: Setting, *, history: History) -> bool:
    """Whether every logged step and the last weights are the parent's."""
    parent = RunLayout(setting.run(PARENT, seed=job.seed))
    theirs, ours = (h.latest_by_step("step") for h in (read_history(parent.events), history))
    for step in range(job.first_step + 1, job.last_step + 1):
        then, now = theirs.get(step, {}), ours.get(step)
        if now is None or any(then.get(name) != now.get(name) for name in COMPARED):
            return False
    last = job.last_step
    hashes = [_weights_sha256(layout, last) for layout in (parent, RunLayout(job.run))]
    return hashes[0] is not None and hashes[0] == hashes[1]


def _weights_sha256(layout: RunLayout, step: int) -> str | None:
    try:
        manifest = read_checkpoint_manifest(layout.checkpoint(step), run_id=None, step=step)
    except (CheckpointError, StorageError):
        return None
    return str(manifest["files"].get(MODEL_FILE, {}).get("sha256"))
