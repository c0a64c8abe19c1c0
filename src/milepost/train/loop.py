"""The one training loop. What varies is passed in; what is periodic is an ordered list."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from milepost.checkpoint.state import Progress
from milepost.core.console import say
from milepost.core.units import format_duration
from milepost.data.batch import Batch, Batches
from milepost.runs.events import EventWriter
from milepost.train.guarding import Guarding
from milepost.train.periodic import Periodic
from milepost.train.replay import ReplayCheck
from milepost.train.saving import Saver
from milepost.train.step import Stepper, StepResult
from milepost.train.throughput import Throughput


@dataclass
class LoopParts:
    """Everything the loop is made of, built in `train/build.py`.

    Attributes:
        progress: where the run stands; the loop replaces it after every update.
        periodic: in the order in which they run; saving comes last.
        saver: takes a checkpoint at a stop between two; None on every rank but the main one.
        events: None on every rank but the main one.
        guarding: judges every update before it is applied.
        watching: a block that ends in good time, or it is said where it stands.
    """

    progress: Progress
    last_step: int
    batches: Batches
    learning_rate: Callable[[int], float]
    stepper: Stepper
    periodic: Sequence[Periodic]
    saver: Saver | None
    throughput: Throughput
    replay: ReplayCheck
    events: EventWriter | None
    stop_requested: Callable[[], bool]
    guarding: Guarding
    watching: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def run_loop(parts: LoopParts) -> bool:
    """Trains until the last step or until a stop is asked for; every rank must call.

    The last save is under way when it returns.

    Returns:
        True if a stop was asked for.

    Raises:
        DivergedError: a guard has given up; the newest checkpoint is from before it.
        StorageError: the history or a checkpoint cannot be written.
        DataError: a shard went away.
    """
    is_stopping = _act(parts, [periodic for periodic in parts.periodic if periodic.at_start])
    while not is_stopping and parts.progress.step < parts.last_step:
        parts.progress = parts.guarding.recall(parts.progress)
        step_started = time.perf_counter()
        before = parts.progress
        batch = parts.batches.batch(before.data_step)
        learning_rate = parts.learning_rate(before.step)
        with parts.watching():
            result = parts.stepper.run_step(
                batch,
                learning_rate=learning_rate,
                stop_requested=parts.stop_requested,
                judge=parts.guarding.judge_at(before),
            )
        step_seconds = time.perf_counter() - step_started
        parts.progress = replace(before, training_seconds=before.training_seconds + step_seconds)
        if result.is_applied:
            _advance(parts, result, batch, learning_rate, step_seconds)
        else:
            _refuse(parts, result, batch)
        # What else is due waits until the run goes on; whoever asks for a stop may not wait for it.
        is_stopping = result.is_stop_requested and parts.progress.step < parts.last_step
        if result.is_applied and not is_stopping:
            is_stopping = _act(parts, [p for p in parts.periodic if _is_due(p, parts)])
    if is_stopping and parts.saver is not None:
        parts.saver.save(parts.progress)
    _end_replay(parts)
    return is_stopping


def _is_due(periodic: Periodic, parts: LoopParts) -> bool:
    return periodic.is_due(parts.progress.step, last_step=parts.last_step)


def _act(parts: LoopParts, due: Sequence[Periodic]) -> bool:
    """Runs what is due, in order; True, and the rest left out, where a stop was asked for."""
    return any(periodic.action(parts.progress) for periodic in due)


def _end_replay(parts: LoopParts) -> None:
    if parts.events is not None:
        parts.replay.report_if_done(parts.progress.step, events=parts.events, is_last=True)


def _advance(
    parts: LoopParts,
    result: StepResult,
    batch: Batch,
    learning_rate: float,
    step_seconds: float,
) -> None:
    """Counts an applied update, and records it."""
    before, scale = parts.progress, parts.stepper.loss_scale
    parts.progress = replace(
        before,
        step=before.step + 1,
        tokens_seen=before.tokens_seen + batch.num_targets,
        loss_scale=scale.value,
        steps_at_scale=scale.steps_at_scale,
        guards=parts.guarding.verdict.numbers,
    )
    if parts.events is not None:
        _record(parts, result, batch, before.data_step, learning_rate, step_seconds)
    parts.guarding.note_applied(result, batch, progress=before)


def _refuse(parts: LoopParts, result: StepResult, batch: Batch) -> None:
    """Does what is done in the place of an update that was not applied."""
    before = parts.progress
    parts.progress = parts.guarding.refuse(result, batch, progress=before)
    if parts.events is not None and parts.guarding.verdict.action == "roll_back":
        # What a rollback undoes is no measure for the steps that come in its place.
        parts.replay.report_if_done(before.step, events=parts.events, is_last=True)
        parts.replay.forget_after(parts.progress.step)


def _record(
    parts: LoopParts,
    result: StepResult,
    batch: Batch,
    data_step: int,
    learning_rate: float,
    step_seconds: float,
) -> None:
    """Writes the step's event, compares it with an earlier one, and says it."""
    assert parts.events is not None
    step = parts.progress.step
    rate, mfu_fraction = parts.throughput.add(step_seconds)
    numbers = {
        "loss_nats": result.loss_nats,
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        "batch_sha256": batch.sha256,
    }
    parts.events.append(
        "step",
        step=step,
        data_step=data_step,
        **numbers,
        tokens_seen=parts.progress.tokens_seen,
        tokens_per_second=rate,
        step_seconds=step_seconds,
        mfu_fraction=mfu_fraction,
        loss_scale=parts.progress.loss_scale,
        repeats=result.num_repeats,
    )
    parts.replay.compare(step, numbers)
    left = parts.throughput.seconds_left(parts.last_step - step)
    width = len(str(parts.last_step))
    say(
        f"step {step:>{width}}/{parts.last_step}  loss {result.loss_nats:.4f}  "
        f"lr {learning_rate:.2e}  norm {result.grad_norm:.3f}  {rate:,.0f} tok/s  "
        f"left {format_duration(left)}"
    )
    parts.replay.report_if_done(step, events=parts.events, is_last=False)
