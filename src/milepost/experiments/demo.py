"""The demo: the whole road in miniature, on real text, with a kill in the middle.

Prepare, train, be killed, go on exactly, sample, report; then learn to answer questions. All is
done with the commands a user has; this file only orders and tells them. The second half is
`demo_tuning`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.core.console import say, show
from milepost.core.environment import num_available_cores
from milepost.core.errors import MilepostError
from milepost.core.units import format_duration
from milepost.data.prepare import prepare
from milepost.evaluation.samples import record_samples
from milepost.experiments.demo_tuning import (
    ON_THE_CPU,
    TUNING_RECIPE,
    TuningResult,
    show_tuning,
    tune_and_ask,
)
from milepost.experiments.segment_process import run_with_progress
from milepost.experiments.sotu import find_addresses
from milepost.inference.load import load_model
from milepost.runs.events import History, read_history
from milepost.runs.layout import RunLayout, checkpoint_folders
from milepost.runs.records import SampleRecord
from milepost.trajectory.report import write_report

RECIPE = "demo"
PROMPT = "The relations of the United States with"
STEPS_AFTER_CHECKPOINT = 23
"""The kill comes so many steps after a checkpoint, so that there is something to compare."""

NUM_SAMPLES = 5
SAMPLE_TOKENS = 60


class NotExact(MilepostError):
    """Steps that were run again differ from what was logged before the kill."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed."""

    run: Path
    report: Path
    num_compared: int
    num_equal: int
    bits_per_byte: float
    seconds: float
    samples: list[SampleRecord]
    tuning: TuningResult

    def as_plain(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {
            "run": str(self.run),
            "report": str(self.report),
            "steps_compared": self.num_compared,
            "steps_equal": self.num_equal,
            "bits_per_byte": self.bits_per_byte,
            "seconds": self.seconds,
            "samples": [sample.as_line() for sample in self.samples],
            "finetuning": self.tuning.as_plain(),
        }


def run_demo(run: Path, *, recipe: str = RECIPE, tuning_recipe: str = TUNING_RECIPE) -> DemoResult:
    """The whole road; a demo that was interrupted goes on where it was.

    Args:
        run: the run folder; the prepared data goes beside it, to RUN-data, the questions to
            RUN-questions.jsonl, and the fine-tuning to RUN-tuned.
        recipe: packaged name or .toml file; its vocabulary size is the one that is trained.
        tuning_recipe: likewise, of the fine-tuning.

    Raises:
        MilepostError: a part failed, or the resumed run was not exact.
    """
    started = time.monotonic()
    config = load_recipe(recipe)
    run = run.resolve()
    data = run.with_name(f"{run.name}-data")
    say("1/8  prepare the State of the Union addresses")
    addresses = find_addresses()
    prepare(
        addresses.train,
        out=data,
        tokenizer=f"train:{config.model.vocab_size}",
        val_sources=addresses.held_out,
    )
    _train(run, data=data, config=config, recipe=recipe)
    history = read_history(RunLayout(run).events)
    num_compared, num_equal = _say_exactness(history)
    say("4/8  let five checkpoints write")
    samples = _sample(run, seed=config.run.seed)
    say("5/8  write the report")
    report = write_report(run)
    tuning = tune_and_ask(run, recipe=tuning_recipe)
    return DemoResult(
        run=run,
        report=report,
        num_compared=num_compared,
        num_equal=num_equal,
        bits_per_byte=_last_bits_per_byte(history),
        seconds=time.monotonic() - started,
        samples=samples,
        tuning=tuning,
    )


def show_demo(result: DemoResult) -> None:
    """What both halves showed and where the reports lie, for people."""
    for sample in result.samples:
        text = " ".join(sample.completion.split())
        show(f"\nstep {sample.step}: {PROMPT} {text}")
    show_tuning(result.tuning)
    show(
        f"\n{_exactness_in_words(result.num_equal, result.num_compared)}; "
        f"held-out text: {result.bits_per_byte:.3f} bits per byte; "
        f"{format_duration(result.seconds)} in all"
    )
    show(f"report: {result.report}")
    show(f"report of the fine-tuning: {result.tuning.report}")
    say(f"next: milepost chat {result.tuning.run}")


def kill_step(config: Config) -> int:
    """The step at which the demo kills its training: mid-way, after a checkpoint."""
    every = config.checkpoint.every_steps
    return config.last_step // 2 // every * every + STEPS_AFTER_CHECKPOINT


def _train(run: Path, *, data: Path, config: Config, recipe: str) -> None:
    words = ["train", recipe, "--run", str(run), "--data.path", str(data)]
    layout = RunLayout(run)
    kill_at = kill_step(config)
    segment = partial(
        run_with_progress,
        words,
        what="train",
        run=run,
        last_step=config.last_step,
        environment=ON_THE_CPU,
    )
    if _may_be_killed(read_history(layout.events), kill_at=kill_at):
        cores = num_available_cores()
        say(f"2/8  train a small LLaMA on {cores} cores; it will be killed at step {kill_at}")
        if segment(kill_when=lambda event: event["step"] >= kill_at):
            steps = read_history(layout.events).latest_by_step("step")
            say(f"     killed (SIGKILL) after step {max(steps)}")
    restorable = max((step for step, _ in checkpoint_folders(layout)), default=0)
    say(f"3/8  go on from the checkpoint of step {restorable} with the same command")
    segment()


def _may_be_killed(history: History, *, kill_at: int) -> bool:
    """Whether the kill is still to come: nothing was compared and its step is not reached."""
    steps = history.latest_by_step("step")
    has_compared = any(event["compared"] for event in history.of_kind("replayed"))
    return not has_compared and max(steps, default=0) < kill_at


def _say_exactness(history: History) -> tuple[int, int]:
    compared = sum(event["compared"] for event in history.of_kind("replayed"))
    equal = sum(event["equal"] for event in history.of_kind("replayed"))
    if equal != compared:
        raise NotExact(
            f"not exact: {equal} of {compared} steps that were run again are as logged before",
            hint="report this with the run's events.jsonl; milepost doctor says what this "
            "machine is",
        )
    say(f"     {_exactness_in_words(equal, compared)}")
    return compared, equal


def _exactness_in_words(equal: int, compared: int) -> str:
    if compared == 0:  # interrupted by hand, and stopped in order
        return "no step had to be run again, so nothing was compared"
    return f"exact: {equal} of {compared} steps"


def _sample(run: Path, *, seed: int) -> list[SampleRecord]:
    layout = RunLayout(run)
    steps = [step for step, _ in checkpoint_folders(layout)]
    records: list[SampleRecord] = []
    for step in spread(steps, count=NUM_SAMPLES):
        loaded = load_model(run, step=step)
        records += record_samples(
            loaded.model,
            loaded.tokenizer,
            [PROMPT],
            step=step,
            path=layout.samples,
            max_new_tokens=SAMPLE_TOKENS,
            temperature=0.7,
            top_k=40,
            seed=seed,
        )
    return records


def spread(steps: list[int], *, count: int) -> list[int]:
    """At most `count` steps, the first and the last among them, denser at the start.

    A model learns most in its first steps, so places double: 1, 2, 4, 8 ... of the whole.
    """
    if len(steps) <= count:
        return steps
    last = len(steps) - 1
    places = {0, last} | {round(last / 2**k) for k in range(1, count - 1)}
    spare = (place for place in range(last, -1, -1) if place not in places)
    while len(places) < count:
        places.add(next(spare))
    return [steps[place] for place in sorted(places)]


def _last_bits_per_byte(history: History) -> float:
    validations = history.latest_by_step("validation")
    return float(validations[max(validations)]["bits_per_byte"])
