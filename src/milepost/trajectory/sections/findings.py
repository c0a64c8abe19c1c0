"""Sentences of the summary that rest on statistics: what jumped, what moves together, the rubric.

They give a number with its limit, and nothing that the sections below do not show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from milepost.core.units import format_count
from milepost.runs.metric_names import BITS_PER_BYTE, TRAIN_LOSS, VAL_LOSS
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.jumps import Jump, has_enough_steps
from milepost.trajectory.outliers import OddCheckpoint
from milepost.trajectory.sections.comparison import Compared
from milepost.trajectory.sections.measures import (
    MAX_BENCHMARKS,
    main_scores,
    other_metrics,
    rubric_groups,
    standard_measure,
)
from milepost.trajectory.sections.spikes import height_words
from milepost.trajectory.sections.together import STEPS, Pair
from milepost.trajectory.sections.wording import (
    capitalized,
    decimals_of,
    enumerate_words,
    interval_words,
    is_fraction,
    metric_words,
    plain,
    plural,
    times,
    value_words,
)
from milepost.trajectory.statistics.correlation import Coefficient
from milepost.trajectory.subject import Subject

MAX_NAMED = 8


def course_paragraphs(course: Course) -> list[str]:
    """What a course that is no run shows, from its curves alone."""
    told = [f"The numbers come from {course.source}."]
    told += [_restarts(course)] if course.restarts else []
    metrics = [m for m in (TRAIN_LOSS, VAL_LOSS, BITS_PER_BYTE) if m in course.curves]
    metrics += [*main_scores(course), *other_metrics(course)][:MAX_BENCHMARKS]
    first_to_last = [_way(metric, course.curves[metric]) for metric in metrics]
    return [" ".join(sentences) for sentences in (told, first_to_last) if sentences]


def jump_sentences(
    run: Trajectory, *, jumps: Sequence[Jump], odd: Sequence[OddCheckpoint]
) -> list[str]:
    """What jumped, and which checkpoints stand out."""
    told = []
    if jumps:
        counts = Counter(metric_words(jump.metric) for jump in jumps)
        jumped = [f"{words} jumped {times(count)}" for words, count in counts.items()]
        # A norm jumps more often and higher than a loss, and matters less.
        largest = next((jump for jump in jumps if jump.metric in (TRAIN_LOSS, VAL_LOSS)), jumps[0])
        steps = largest.steps_to_recovery
        end = "did not go away" if steps is None else f"was gone after {plural(steps, 'step')}"
        told.append(
            f"{capitalized(enumerate_words(jumped))}; the largest jump of"
            f" {metric_words(largest.metric)}, {height_words(largest)} at step {largest.step:,},"
            f" {end} ({largest.cause})."
        )
    elif has_enough_steps(run):
        told.append("No jump of loss or gradient norm stands out.")
    if odd:
        named = enumerate_words([f"{checkpoint.step:,}" for checkpoint in odd[:MAX_NAMED]])
        more = f" and {len(odd) - MAX_NAMED:,} more" if len(odd) > MAX_NAMED else ""
        told.append(f"Scores stand out from those of the neighbors at step {named}{more}.")
    return told


def together_sentences(subject: Subject, *, pairs: Sequence[Pair]) -> list[str]:
    """How far the one pair that says most moves together, and how little that shows."""
    pair = _main_pair(subject, pairs)
    if pair is None or pair.correlation.pearson is None:
        return []
    c, r = pair.correlation, pair.correlation.pearson
    name = capitalized(pair.name)
    if not r.is_told_from_zero:
        return [f"Whether {pair.name} go together, {c.n:,} points do not tell ({_r(r)})."]
    way = "go together" if r.value > 0 else "go opposite ways"
    told = f"{name} {way} over {c.n:,} points ({_r(r)})"
    if c.is_beyond_trend:
        return [f"{told}, and something is left beyond a trend in log(steps)."]
    left = "" if c.partial is None else f": given log(steps), what is left has {_r(c.partial)}"
    return [f"{told}; a trend with training time may be all of it{left}."]


def rubric_sentences(subject: Subject) -> list[str]:
    """From where to where the average score of each group of raters went."""
    told = []
    for group in rubric_groups(subject):
        first, last = group.averages[0], group.averages[-1]
        start = f"By {group.raters}, the average score on the rubric"
        if len(group.steps) == 1:
            told.append(f"{start} is {first:.2f} at step {group.steps[0]:,}, the only one rated.")
        else:
            told.append(
                f"{start} went from {first:.2f} at step {group.steps[0]:,} to {last:.2f} at step"
                f" {group.steps[-1]:,}."
            )
    return told


def comparison_sentences(subject: Subject, *, compared: Sequence[Compared]) -> list[str]:
    """What is laid over the main course, and the first score or value that they share."""
    if not subject.others:
        return []
    told = [f"Laid over it: {enumerate_words([course.name for course in subject.others])}."]
    if compared:
        # A loss compares only for the same text; a score says more of other people's models.
        first = next((one for one in compared if is_fraction(one.metric)), compared[0])
        decimals = decimals_of(first.metric, (v for v in first.values if v is not None))
        values = [
            f"{_with_unit(first.metric, value, decimals=decimals)} for {course.name}"
            for course, value in zip(subject.courses, first.values, strict=True)
            if value is not None
        ]
        told.append(
            f"At {format_count(first.tokens)} tokens, {metric_words(first.metric)} is"
            f" {enumerate_words(values)}."
        )
    return told


def _main_pair(subject: Subject, pairs: Sequence[Pair]) -> Pair | None:
    """A score of the rubric with the standard benchmark or the loss, else those two."""
    standard = standard_measure(subject.course)
    name = None if standard is None else standard.metric
    known = [pair for pair in pairs if pair.correlation.pearson is not None and pair.x is not STEPS]
    rated = [pair for pair in known if pair.y.is_rubric]
    first_choice = [pair for pair in rated if pair.x.metric == name]
    last_choice = [pair for pair in known if pair.y.metric == name]
    return next(iter([*first_choice, *rated, *last_choice]), None)


def _restarts(course: Course) -> str:
    steps = [f"{step:,}" for step in course.restarts[:MAX_NAMED]]
    more = len(course.restarts) - MAX_NAMED
    named = enumerate_words(steps) + (f" and {more:,} more" if more > 0 else "")
    return f"Training was started anew at {'step' if len(steps) == 1 else 'steps'} {named}."


def _way(metric: str, curve: Curve) -> str:
    name, decimals = capitalized(metric_words(metric)), decimals_of(metric, curve.values.tolist())
    first, last = (_with_unit(metric, curve.values[n], decimals=decimals) for n in (0, -1))
    if len(curve) == 1:
        return f"{name} is {last}{_at(curve, 0)}, the only value."
    return f"{name} went from {first}{_at(curve, 0)} to {last}{_at(curve, -1)}."


def _at(curve: Curve, place: int) -> str:
    """Where a point lies, as far as that is known."""
    step, tokens = curve.steps[place], curve.tokens[place]
    if step == step:
        return f" at step {int(step):,}"
    return f" at {format_count(tokens)} tokens" if tokens == tokens else ""


def _with_unit(metric: str, value: float, *, decimals: int) -> str:
    told = value_words(metric, value, decimals=decimals)
    if is_fraction(metric):
        return f"{told} %"
    return f"{told} nats" if metric in (TRAIN_LOSS, VAL_LOSS) else told


def _r(one: Coefficient) -> str:
    told = f"r = {plain(one.value, decimals=3)}"
    if one.interval is None:
        return told
    return f"{told}, 95 % {interval_words(one.interval, decimals=2)}"
