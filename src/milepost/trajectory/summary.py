"""What happened, in sentences that give only what the data show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from milepost.core.units import format_count, format_duration
from milepost.runs.lineage import FULL, lineage_of, restore_text, restore_words
from milepost.trajectory.benchmarks import Series, main_series
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.finetuning import finetuning_of
from milepost.trajectory.finetuning import numbers as finetuning_numbers
from milepost.trajectory.refused import refused_sentences
from milepost.trajectory.sections.tuning import changed_sentences, tuned_sentence
from milepost.trajectory.sections.wording import enumerate_words, plural
from milepost.trajectory.segments import Segment

MAX_SEGMENTS_TOLD = 5
MAX_STEPS_NAMED = 8
MIN_WORDS_FOR_COUNT = 10_000

KILLED = "was killed (it has no end on record)"
KILLED_MANY = "killed (no end on record)"

_ENDS = {
    "done": "reached its last step",
    "stop_at_step": "stopped at stop_at_step",
    "stop requested": "stopped on request",
    "diverged": "stopped because training diverged",
    "storage": "stopped because the storage failed",
    "failed": "failed",
}


def paragraphs(trajectory: Trajectory) -> list[str]:
    """The summary of a run, a paragraph a text."""
    if not trajectory.has_events:
        told = "There are no events yet: nothing of this run has been recorded."
        return [" ".join([told, *left_out(trajectory), *_unreadable(trajectory)])]
    tuned = finetuning_of(trajectory)
    progress, outcome = [_progress(trajectory, noun="token")], [_validation(trajectory)]
    if tuned is not None:
        progress = [tuned_sentence(tuned), _progress(trajectory, noun="answer token")]
        outcome = changed_sentences(trajectory, tuned)
    written = (
        [*progress, *_origin(trajectory), _segments(trajectory.segments), *_stale(trajectory)],
        _exactness(trajectory.segments),
        refused_sentences(trajectory.refused),
        [*outcome, _speed(trajectory, noun="token" if tuned is None else "position")],
        [*_benchmarks(trajectory), *left_out(trajectory)],
        [*_missing(trajectory), *_others(trajectory), *_unreadable(trajectory)],
    )
    return [" ".join(sentences) for sentences in written if sentences]


def _origin(trajectory: Trajectory) -> list[str]:
    """Where a run began that was made from a checkpoint of another."""
    lineage = lineage_of(trajectory.manifest.lineage)
    if lineage is None:
        return []
    restored = restore_words(restore_text(lineage.parts))
    told = f"It began with step {lineage.step:,} of {lineage.run.name}, restored: {restored}."
    if lineage.changed:
        fields = enumerate_words(list(lineage.changed))
        told += (
            f" Against that run {fields} {'is' if len(lineage.changed) == 1 else 'are'} changed."
        )
    return [told]


def numbers(trajectory: Trajectory) -> dict[str, Any]:
    """The summary for programs."""
    losses = trajectory.validation.points("loss_nats")
    bits = trajectory.validation.points("bits_per_byte")
    replays = [s.replay for s in trajectory.segments if s.replay is not None]
    tuned = finetuning_of(trajectory)
    return {
        "name": trajectory.name,
        "run_id": trajectory.manifest.run_id,
        "last_step": trajectory.last_step,
        "total_steps": trajectory.manifest.config.train.total_steps,
        "tokens_seen": tokens_seen(trajectory),
        "segments": [
            {"number": s.number, "exactness": s.say("exactness"), "end_reason": s.end_reason}
            for s in trajectory.segments
        ],
        "compared_steps": sum(replay.compared for replay in replays),
        "equal_steps": sum(replay.equal for replay in replays),
        "first_validation": _as_point(losses[:1], bits[:1]),
        "last_validation": _as_point(losses[-1:], bits[-1:]),
        "finetuning": None if tuned is None else finetuning_numbers(tuned),
        "benchmarks": [_as_score(series) for series in trajectory.benchmarks],
        "left_out_scores": asdict(trajectory.left_out_scores),
        "median_tokens_per_second": median_speed(trajectory),
        "training_seconds": sum(s.training_seconds for s in trajectory.segments),
        "wall_seconds": wall_seconds(trajectory.segments),
        "missing_steps": num_missing(trajectory),
        "skipped_batches": len(trajectory.refused.skips),
        "rollbacks": len(trajectory.refused.rollbacks),
        "unreadable_lines": trajectory.num_bad_lines,
    }


def tokens_seen(trajectory: Trajectory) -> int | None:
    """Tokens the model had seen at its last step, None where no step says."""
    points = trajectory.steps.points("tokens_seen")
    return int(points[-1][1]) if points else None


def median_speed(trajectory: Trajectory) -> float | None:
    """The median of tokens per second over the steps."""
    points = trajectory.steps.points("tokens_per_second")
    return median(value for _, value in points) if points else None


def wall_seconds(segments: Sequence[Segment]) -> float | None:
    """The segments' wall times together, None where a clock went backwards."""
    times = [segment.wall_seconds for segment in segments]
    known = [time for time in times if time is not None]
    return sum(known) if known and len(known) == len(times) else None


def num_missing(trajectory: Trajectory) -> int:
    """Steps absent between the first and the last of the history."""
    return sum(last - first + 1 for first, last in trajectory.missing_steps)


def ending(segment: Segment, *, is_last: bool) -> str:
    """Why a segment ended, in words that fit behind its name."""
    if segment.end_reason is not None:
        return _ENDS.get(segment.end_reason, f"ended: {segment.end_reason}")
    if is_last:
        return "has no end on record: it is running, or it was killed"
    return KILLED


def _as_point(losses: Sequence[Any], bits: Sequence[Any]) -> dict[str, Any] | None:
    if not losses:
        return None
    step, loss = losses[0]
    same = bits and bits[0][0] == step
    return {"step": step, "loss_nats": loss, "bits_per_byte": bits[0][1] if same else None}


def _as_score(series: Series) -> dict[str, Any]:
    setting, latest = series.setting, series.latest
    return {
        "benchmark": setting.benchmark,
        "num_fewshot": setting.num_fewshot,
        "limit": setting.limit,
        "dtype": setting.dtype,
        "step": latest.step,
        "n": latest.num_items,
        "metrics": {name: asdict(score) for name, score in latest.scores.items()},
        "chance": latest.chance,
        "majority": latest.majority,
    }


def _progress(trajectory: Trajectory, *, noun: str) -> str:
    train = trajectory.manifest.config.train
    tokens = tokens_seen(trajectory)
    told = f"The run has done {trajectory.last_step:,} of {plural(train.total_steps, 'step')}"
    if tokens is not None:
        told += f" and seen {plural(tokens, noun)}"
        if tokens >= MIN_WORDS_FOR_COUNT:
            told += f" ({format_count(tokens)})"
    if train.stop_at_step is not None and train.stop_at_step < train.total_steps:
        told += f"; it was told to stop at step {train.stop_at_step:,}"
    return told + "."


def _segments(segments: Sequence[Segment]) -> str:
    if len(segments) == 1:
        return f"It ran in one segment, which {ending(segments[0], is_last=True)}."
    told = f"It ran in {len(segments):,} segments: "
    last = segments[-1]
    if len(segments) <= MAX_SEGMENTS_TOLD:
        parts = [
            f"segment {s.number}{_steps_of(s)} {ending(s, is_last=s is last)}" for s in segments
        ]
        return told + "; ".join(parts) + "."
    ends = Counter(ending(segment, is_last=segment is last) for segment in segments)
    words = [f"{count:,} {end}".replace(KILLED, KILLED_MANY) for end, count in ends.items()]
    return told + "; ".join(words) + "."


def _steps_of(segment: Segment) -> str:
    if segment.first_step is None or segment.last_step is None:
        return " (no steps)"
    if segment.first_step == segment.last_step:
        return f" (step {segment.first_step:,})"
    return f" (steps {segment.first_step:,} to {segment.last_step:,})"


def _stale(trajectory: Trajectory) -> list[str]:
    """Says where the newest segment has not yet come as far as one before it."""
    with_steps = [s for s in trajectory.segments if s.last_step is not None]
    if not with_steps:
        return []
    reached = with_steps[-1].last_step or 0
    if reached >= trajectory.last_step:
        return []
    return [
        f"The newest segment has reached step {reached:,};"
        " the values after it are those of a segment before."
    ]


def _exactness(segments: Sequence[Segment]) -> list[str]:
    resumes = [segment for segment in segments if segment.resumed_at is not None]
    if not resumes:
        return []
    told = [_compared(resumes)]
    reasons = Counter(
        s.say("reason") or "no reason on record"
        for s in resumes
        if s.say("exactness") == "approximate"
    )
    told += [
        f"{plural(count, 'resume')} {'is' if count == 1 else 'are'} approximate by the segment's"
        f" own word: {reason}."
        for reason, count in reasons.items()
    ]
    for segment in resumes:
        restored = segment.say("restored")
        if restored not in (None, FULL):
            told.append(f"Segment {segment.number} restored {restore_words(str(restored))}.")
    return told


def _compared(resumes: Sequence[Segment]) -> str:
    replays = [segment.replay for segment in resumes if segment.replay is not None]
    compared, equal = sum(r.compared for r in replays), sum(r.equal for r in replays)
    which = "The resume" if len(resumes) == 1 else f"Every one of the {len(resumes):,} resumes"
    if not compared:
        return "No step was run again after a resume, so there was nothing to compare."
    if equal == compared:
        told = f"{which} was exact: {equal:,} of {plural(compared, 'step')}"
        if len(replays) < len(resumes):
            told = f"Exact: {equal:,} of {plural(compared, 'step')}"
        told += " run again gave the same loss, gradient norm and batch as before."
        if len(replays) < len(resumes):
            told += f" After {plural(len(resumes) - len(replays), 'resume')} no step was run again."
        return told
    differing = sorted({step for replay in replays for step in replay.differing_steps})
    named = enumerate_words([f"{step:,}" for step in differing[:MAX_STEPS_NAMED]])
    num_more = compared - equal - MAX_STEPS_NAMED
    more = f" and {num_more:,} more" if num_more > 0 else ""
    steps = f" They differ at step {named}{more}." if differing else ""
    return (
        f"Not every resume was exact: {equal:,} of {plural(compared, 'step')} run again gave the"
        f" same loss, gradient norm and batch as before.{steps}"
    )


def _validation(trajectory: Trajectory) -> str:
    losses = trajectory.validation.points("loss_nats")
    if not losses:
        return "There is no validation on record."
    bits = dict(trajectory.validation.points("bits_per_byte"))
    first, last = losses[0], losses[-1]
    if len(losses) == 1:
        told = f"Validation loss was {last[1]:.4f} nats per token at step {last[0]:,}"
        told += f" ({bits[last[0]]:.3f} bits per byte)" if last[0] in bits else ""
        return told + ", the only one on record."
    told = (
        f"Validation loss went from {first[1]:.4f} nats per token at step {first[0]:,}"
        f" to {last[1]:.4f} at step {last[0]:,}"
    )
    if first[0] in bits and last[0] in bits:
        told += f", bits per byte from {bits[first[0]]:.3f} to {bits[last[0]]:.3f}"
    lowest = min(losses, key=lambda point: point[1])
    if lowest[1] < last[1]:
        told += f"; the lowest was {lowest[1]:.4f} at step {lowest[0]:,}"
    return told + "."


def _benchmarks(trajectory: Trajectory) -> list[str]:
    told = main_series(trajectory.benchmarks)
    if not told:
        return []
    by_name = {series.setting.benchmark: series for series in told}
    sentences = [_course(by_name.get("hellaswag") or by_name.get("heldout") or told[0])]
    if len(told) > 1:
        for beats, words in _VERDICTS.items():
            names = [s.setting.name for s in told if s.latest.beats_guessing is beats]
            if names:
                sentences.append(f"{words}: {enumerate_words(names)}.")
    return sentences


def left_out(trajectory: Trajectory) -> list[str]:
    """Says how many scores of the log do not count, and why."""
    counted = trajectory.left_out_scores
    reasons = (
        (counted.foreign, "of other runs or models"),
        (counted.not_whole, "without a whole file of items"),
    )
    return [
        f"{plural(count, 'score')} {reason} {'is' if count == 1 else 'are'} left out."
        for count, reason in reasons
        if count
    ]


_VERDICTS = {
    True: "At the latest step, more than two standard errors above chance and majority",
    False: "Below that",
    None: "Without a standard error or a chance to compare with",
}


def _course(series: Series) -> str:
    first, latest = series.evaluations[0], series.latest
    metric, guessing = latest.main_metric, latest.guessing
    told = f"{series.setting.name} ({series.words}): {metric} "
    if first is latest or metric not in first.scores:
        told += f"was {latest.main_score} at step {latest.step:,}"
    else:
        told += f"went from {first.scores[metric]} at step {first.step:,}"
        told += f" to {latest.main_score} at step {latest.step:,}"
    return told + (
        f"; guessing gives at best {100 * guessing:.1f} %." if guessing is not None else "."
    )


def _speed(trajectory: Trajectory, *, noun: str) -> str:
    segments, speed = trajectory.segments, median_speed(trajectory)
    at = f" at a median of {speed:,.0f} {noun}s per second" if speed is not None else ""
    training = format_duration(sum(segment.training_seconds for segment in segments))
    return (
        f"Training took {training}{at}, counting steps only; with everything around them"
        f" the wall time of the segments is {format_duration(wall_seconds(segments))}."
    )


def _missing(trajectory: Trajectory) -> list[str]:
    gaps = trajectory.missing_steps
    if not gaps:
        return []
    named = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in gaps[:MAX_STEPS_NAMED]]
    num_more = len(gaps) - MAX_STEPS_NAMED
    more = f" and {num_more:,} more gaps" if num_more > 0 else ""
    verb = "is" if num_missing(trajectory) == 1 else "are"
    return [
        f"{plural(num_missing(trajectory), 'step')} {verb} missing in the history:"
        f" {', '.join(named)}{more}."
    ]


def _others(trajectory: Trajectory) -> list[str]:
    counts = [f"{kind} ({count:,})" for kind, count in trajectory.other_events.items()]
    return [f"Also on record: {enumerate_words(counts)}."] if counts else []


def _unreadable(trajectory: Trajectory) -> list[str]:
    return [skipped_lines(n, name=name) + "." for name, n in trajectory.num_bad_lines.items()]


def skipped_lines(count: int, *, name: str) -> str:
    """Says how many lines of a file could not be read."""
    verb = "was" if count == 1 else "were"
    return f"{plural(count, 'line')} of {name} could not be read and {verb} skipped"
