"""Jumps of loss and gradient norm, and what happened where they are.

A cause is what lies near, told in words; that it was the cause is for the reader to judge.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from milepost.config.recipe import is_harmless
from milepost.core.spikes import MIN_HISTORY, RELATIVE_FLOOR, find_spikes, robust_z
from milepost.runs.lineage import restore_words
from milepost.runs.metric_names import GRAD_NORM, STEP_METRICS, TRAIN_LOSS, VAL_LOSS
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.fields import text
from milepost.trajectory.sections.wording import enumerate_words, plural
from milepost.trajectory.segments import Segment

WINDOW_STEPS = 100
"""Steps before each that its level is taken from."""

THRESHOLDS = {"loss_nats": 7.0, "grad_norm": 10.0}
"""Robust z from which a step stands out. Norms have longer tails than losses."""

NEAR_STEPS = 100
"""A jump that begins within so many steps of a resume is told with it."""

SAME_PLACE_STEPS = 5
"""Jumps that begin so close to the first of them are one incident."""

SHIFT_THRESHOLD = 6.0
MIN_SHIFT_HISTORY = 5
SHIFT_WINDOW = 20
"""Changes from one validation to the next that the one over a resume is held against."""

BLOCK_STEPS = 10
MIN_BLOCK_HISTORY = 8
"""Training losses around a resume are taken as medians of blocks; so many changes from block to
block have to be known before it."""

MAX_FIELDS_NAMED = 3


@dataclass(frozen=True)
class Jump:
    """One jump.

    Attributes:
        metric: name of `runs.metric_names`.
        step: where it began; for a validation loss the first validation after the resume.
        height: of its highest value over the level before, in the metric's unit; of a shift of the
            training loss over a resume that of the median of the steps after it.
        z: the same in robust standard deviations.
        steps_to_recovery: steps until the metric was back; None where it never was.
        segment: that logged it.
        cause: what happened near, in words.
        data_step: of the batch of the step where it began; None for a shift over a resume.
        batch_sha256: of that batch.
    """

    metric: str
    step: int
    height: float
    z: float
    steps_to_recovery: int | None
    segment: int | None
    cause: str
    data_step: int | None
    batch_sha256: str | None


@dataclass(frozen=True)
class Resume:
    """Where a segment joins the trajectory.

    Attributes:
        words: "the resume at 8,750 that restored weights only", and what else was new with it.
    """

    step: int
    segment: Segment
    words: str


def has_enough_steps(trajectory: Trajectory) -> bool:
    """Whether there are steps that can be judged by those before them."""
    return any(len(trajectory.steps.points(field)) > MIN_HISTORY for field in THRESHOLDS)


def jumps_of(trajectory: Trajectory) -> list[Jump]:
    """The jumps of a run, the largest first by their robust z.

    Jumps that begin at the same place stay together, those of a loss before those of the norm.
    """
    resumes = resumes_of(trajectory.segments)
    found = list(_step_jumps(trajectory, resumes))
    told = [jump.step for jump in found if jump.metric == TRAIN_LOSS]
    untold = [r for r in resumes if not any(0 < s - r.step <= BLOCK_STEPS for s in told)]
    found += _training_shifts(trajectory, untold)
    found += _validation_jumps(trajectory, resumes)
    found.sort(key=lambda jump: (jump.step, -jump.z))
    places: list[list[Jump]] = []
    for jump in found:
        if places and jump.step - places[-1][0].step <= SAME_PLACE_STEPS:
            places[-1].append(jump)
        else:
            places.append([jump])
    places.sort(key=lambda place: -max(jump.z for jump in place))
    return [
        jump for place in places for jump in sorted(place, key=lambda one: one.metric == GRAD_NORM)
    ]


def resumes_of(segments: Sequence[Segment]) -> list[Resume]:
    """The resumes in order of their segments; one whose place is not known is left out."""
    resumes = []
    for before, segment in itertools.pairwise(segments):
        step = segment.resumed_at
        if step is not None:
            resumes.append(Resume(step, segment, _resume_words(step, segment, before=before)))
    return resumes


def _resume_words(step: int, segment: Segment, *, before: Segment) -> str:
    restored, replay = segment.say("restored"), segment.replay
    told = f"the resume at {step:,}"
    if restored is not None:
        told += f" that restored {restore_words(restored)}"
    old_ranks, ranks = before.count("ranks"), segment.count("ranks")
    if ranks is not None and old_ranks is not None and ranks != old_ranks:
        told += f", on {plural(ranks, 'rank')} in place of {old_ranks}"
    old_device, device = before.say("device"), segment.say("device")
    if device is not None and old_device is not None and device != old_device:
        told += f", on {device} in place of {old_device}"
    if fields := _changed_fields(segment):
        told += f", with {enumerate_words(fields)} changed"
    if replay is not None:
        told += f" ({replay.equal:,} of {plural(replay.compared, 'step')} run again were equal)"
    return told


def _changed_fields(segment: Segment) -> list[str]:
    """Fields of the recipe that were changed with a segment and can move a loss."""
    changed = segment.started.get("changed")
    changes = changed if isinstance(changed, list) else []
    fields = [text(one.get("field")) for one in changes if isinstance(one, dict)]
    return [field for field in fields if field and not is_harmless(field)][:MAX_FIELDS_NAMED]


def _step_jumps(trajectory: Trajectory, resumes: Sequence[Resume]) -> Iterator[Jump]:
    table = trajectory.steps
    data_steps = dict(trajectory.steps.points("data_step"))
    segments = dict(zip(table.steps, table.segments, strict=True))
    for field, threshold in THRESHOLDS.items():
        points = table.points(field)
        values = [value for _, value in points]
        for spike in find_spikes(values, window=WINDOW_STEPS, threshold=threshold):
            step = points[spike.first][0]
            data_step = data_steps.get(step)
            batch = trajectory.batches.get(step)
            whole_data_step = None if data_step is None else int(data_step)
            recovered = None if spike.recovered is None else points[spike.recovered][0] - step
            yield Jump(
                metric=STEP_METRICS[field],
                step=step,
                height=spike.height,
                z=spike.z,
                steps_to_recovery=recovered,
                segment=segments[step],
                cause=_near(trajectory, step, resumes) or _data(whole_data_step, batch),
                data_step=whole_data_step,
                batch_sha256=batch,
            )


def _near(trajectory: Trajectory, step: int, resumes: Sequence[Resume]) -> str:
    """What happened shortly before a step; empty where nothing is on record."""
    told = ""
    before = [one for one in resumes if 0 < step - one.step <= NEAR_STEPS]
    if before:
        latest = max(before, key=lambda one: (one.step, one.segment.number))
        told = _after(step - latest.step, latest.words)
    warmup_steps = trajectory.manifest.config.schedule.warmup_steps
    if step <= warmup_steps:
        warmup = f"in warm-up, which ends at {warmup_steps:,}"
        told = f"{told}; {warmup}" if told else warmup
    return told


def _after(num_steps: int, words: str) -> str:
    return f"{plural(num_steps, 'step')} after {words}"


def _data(data_step: int | None, batch_sha256: str | None) -> str:
    if data_step is None:
        return "no restart near; the batch is not on record"
    batch = "" if batch_sha256 is None else f", batch {batch_sha256[:8]}"
    return f"no restart near: data step {data_step:,}{batch}"


def _training_shifts(trajectory: Trajectory, resumes: Sequence[Resume]) -> Iterator[Jump]:
    """Level shifts of the training loss over a resume, against the changes before it.

    While a loss falls fast the steps before spread widely, and a jump hides among them. From block
    to block it hides less: the fall is what those changes have in common.
    """
    table = trajectory.steps
    points = table.points("loss_nats")
    segments = dict(zip(table.steps, table.segments, strict=True))
    steps, values = [step for step, _ in points], [value for _, value in points]
    for resume in resumes:
        place = bisect_right(steps, resume.step)
        num_blocks = min(place // BLOCK_STEPS, SHIFT_WINDOW + 1)
        if place + BLOCK_STEPS > len(values) or num_blocks <= MIN_BLOCK_HISTORY:
            continue
        starts = range(place - num_blocks * BLOCK_STEPS, place + 1, BLOCK_STEPS)
        blocks = [median(values[start : start + BLOCK_STEPS]) for start in starts]
        *history, height = [after - before for before, after in itertools.pairwise(blocks)]
        z, level = robust_z(height, history), blocks[-2]
        if z <= SHIFT_THRESHOLD or height <= RELATIVE_FLOOR * abs(level):
            continue
        later = range(place + BLOCK_STEPS, len(values) - BLOCK_STEPS + 1)
        back = next((n for n in later if median(values[n : n + BLOCK_STEPS]) <= level), None)
        step = steps[place]
        yield Jump(
            metric=TRAIN_LOSS,
            step=step,
            height=height,
            z=z,
            steps_to_recovery=None if back is None else steps[back] - step,
            segment=segments[step],
            cause=_after(step - resume.step, resume.words),
            data_step=None,
            batch_sha256=None,
        )


def _validation_jumps(trajectory: Trajectory, resumes: Sequence[Resume]) -> Iterator[Jump]:
    """Level shifts of the validation loss over a resume, against the changes before it."""
    table = trajectory.validation
    points, segments = (
        table.points("loss_nats"),
        dict(zip(table.steps, table.segments, strict=True)),
    )
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    changes = [after - before for before, after in itertools.pairwise(values)]
    # Of several resumes between two validations the last is told.
    for place, resume in {bisect_right(steps, one.step): one for one in resumes}.items():
        history = changes[max(0, place - 1 - SHIFT_WINDOW) : max(0, place - 1)]
        if place == len(values) or len(history) < MIN_SHIFT_HISTORY:
            continue
        level, height = values[place - 1], changes[place - 1]
        z = robust_z(height, history)
        if z <= SHIFT_THRESHOLD or height <= RELATIVE_FLOOR * abs(level):
            continue
        back = next((n for n in range(place, len(values)) if values[n] <= level), None)
        yield Jump(
            metric=VAL_LOSS,
            step=steps[place],
            height=height,
            z=z,
            steps_to_recovery=None if back is None else steps[back] - steps[place],
            segment=segments[steps[place]],
            cause=_after(steps[place] - resume.step, resume.words),
            data_step=None,
            batch_sha256=None,
        )
