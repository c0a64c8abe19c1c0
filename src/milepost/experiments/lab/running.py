"""Trains the laboratory's runs, each a run folder of its own, with the commands a user has.

What is done is not done again, and what was interrupted goes on from its own last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from milepost.checkpoint.store import STATE_FOLDER
from milepost.core.console import ProgressBar, progress, say, warn
from milepost.core.errors import CheckpointError, DivergedError
from milepost.core.units import format_duration
from milepost.experiments.lab.arms import Arm
from milepost.experiments.lab.setting import PARENT, Setting
from milepost.experiments.segment_process import SegmentFailed, run_segment
from milepost.runs.events import Event, read_history
from milepost.runs.layout import RunLayout, checkpoint_folders
from milepost.runs.steps import describe_steps

Status = Literal["absent", "begun", "done", "diverged"]


@dataclass(frozen=True)
class Job:
    """One run of the laboratory.

    Attributes:
        arm: None for the parent.
        run: its folder.
        first_step, last_step: in the run's own numbers.
    """

    seed: int
    arm: Arm | None
    run: Path
    first_step: int
    last_step: int

    @property
    def name(self) -> str:
        """Of the arm, or of the parent."""
        return PARENT if self.arm is None else self.arm.name


def jobs_of(setting: Setting, arms: Sequence[Arm], *, seed: int) -> list[Job]:
    """The runs of one seed, the parent first."""
    parent = Job(seed, None, setting.run(PARENT, seed=seed), 0, setting.last_step)
    return [
        parent,
        *(
            Job(
                seed,
                arm,
                setting.run(arm.name, seed=seed),
                arm.first_step(setting),
                arm.last_step(setting),
            )
            for arm in arms
        ),
    ]


def status_of(job: Job) -> tuple[Status, int]:
    """How far a run has come, and its last logged step."""
    history = read_history(RunLayout(job.run).events)
    last = max(history.latest_by_step("step"), default=job.first_step)
    ended = next(reversed(list(history.of_kind("segment_ended"))), {})
    started = next(reversed(list(history.of_kind("segment_started"))), None)
    if started is None:
        return "absent", job.first_step
    is_over = ended.get("segment") == started.get("segment")
    if is_over and ended.get("reason") == "diverged":
        return "diverged", last
    if is_over and ended.get("reason") in ("done", "stop_at_step") and last >= job.last_step:
        return "done", last
    return "begun", last


def words_of(job: Job, setting: Setting) -> list[str]:
    """The command line of a run, without the program's name."""
    words = ["train", str(setting.recipe), "--run", str(job.run)]
    if job.arm is not None:
        parent = setting.run(PARENT, seed=job.seed)
        words += ["--from", f"{parent}:{setting.at}", "--restore", job.arm.restore]
    ranks = 1 if job.arm is None else job.arm.ranks
    words += ["--ranks", str(ranks), "--run.seed", str(job.seed), "--run.name", job.name]
    words += ["--train.stop_at_step", str(job.last_step)]
    if job.arm is None:
        return [*words, "--checkpoint.keep_train_state_every_steps", str(setting.at)]
    return [*words, *job.arm.words]


def train_all(setting: Setting, arms: Sequence[Arm], *, on_seed: Callable[[int], None]) -> None:
    """Trains what is not done yet, seed by seed, so that there are whole results early.

    Args:
        setting: of the laboratory.
        arms: that are trained.
        on_seed: called with a seed when all its runs are done.

    Raises:
        MilepostError: a training failed for another reason than that it diverged; a stop was
            asked for. The same command goes on.
    """
    by_seed = {seed: jobs_of(setting, arms, seed=seed) for seed in setting.seeds}
    jobs = [job for of_seed in by_seed.values() for job in of_seed]
    left = sum(_steps_left(job) for job in jobs)
    num_done = sum(status_of(job)[0] in ("done", "diverged") for job in jobs)
    if num_done:
        say(f"{num_done} of {len(jobs)} runs are done already")
    with progress("resume laboratory", total=max(left, 1)) as bar:
        counter = _Counter(bar, jobs=jobs)
        for seed, of_seed in by_seed.items():
            for job in of_seed:
                if not _train(job, setting, counter=counter):
                    break
            on_seed(seed)


def _steps_left(job: Job) -> int:
    status, last = status_of(job)
    return 0 if status in ("done", "diverged") else job.last_step - min(last, job.last_step)


class _Counter:
    """The laboratory's bar: updates done of all that were left."""

    def __init__(self, bar: ProgressBar, *, jobs: Sequence[Job]) -> None:
        self._bar = bar
        self._places = {job.run: f"run {n} of {len(jobs)}" for n, job in enumerate(jobs, start=1)}
        self._done = 0

    def watch(self, job: Job) -> Callable[[Event], None]:
        """What is called with the steps of one run."""
        _, begun_at = status_of(job)
        before = self._done

        def on_step(event: Event) -> None:
            self._done = before + max(0, event["step"] - begun_at)
            note = f"{self._places[job.run]}, seed {job.seed} {job.name}: step {event['step']}"
            self._bar.update(self._done, note=note)

        return on_step


def _train(job: Job, setting: Setting, *, counter: _Counter) -> bool:
    """Trains one run to its end; False where the parent diverged, so that no arm has a measure."""
    status, _ = status_of(job)
    if status in ("absent", "begun"):
        if job.arm is not None:
            _check_train_state(job, setting)
        try:
            run_segment(
                words_of(job, setting),
                run=job.run,
                on_step=counter.watch(job),
                kill_when=lambda event: False,
            )
        except SegmentFailed as failure:
            if failure.exit_code != DivergedError.exit_code:
                raise
        status, last = status_of(job)
        _say_end(job, status=status, last_step=last)
    return job.arm is not None or status != "diverged"


def _say_end(job: Job, *, status: Status, last_step: int) -> None:
    if status == "diverged":
        warn(f"seed {job.seed} {job.name} diverged after step {last_step}; that is its result")
        return
    steps = read_history(RunLayout(job.run).events).of_kind("step")
    took = format_duration(sum(event.get("step_seconds") or 0.0 for event in steps))
    say(f"seed {job.seed} {job.name}: done, {took} in steps")


def _check_train_state(job: Job, setting: Setting) -> None:
    """Raises where the parent lost what an arm begins with."""
    parent = RunLayout(setting.run(PARENT, seed=job.seed))
    if (parent.checkpoint(setting.at) / STATE_FOLDER).is_dir() or status_of(job)[0] == "begun":
        return
    steps = list(_steps_with_state(parent))
    told = describe_steps(steps, what="train states") if steps else "it has none at all"
    raise CheckpointError(
        f"{parent.root} has no train state at step {setting.at}, which the arms begin with",
        hint=f"{told}; delete {parent.root} to train the parent anew",
    )


def _steps_with_state(layout: RunLayout) -> Iterator[int]:
    for step, folder in checkpoint_folders(layout):
        if (folder / STATE_FOLDER).is_dir():
            yield step
