"""The curves of a run, under the names that trackers and imports use."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from milepost.planner.cost import flops_per_token
from milepost.runs.metric_names import (
    STEP_METRICS,
    VALIDATION_METRICS,
    benchmark_metric,
    rubric_metric,
)
from milepost.trajectory.benchmarks import METRICS, Series, main_series
from milepost.trajectory.collect import Table, Trajectory
from milepost.trajectory.course import MAX_TOKENS, Course, Curve
from milepost.trajectory.fields import finite, text, whole
from milepost.trajectory.finetuning import other_samples
from milepost.trajectory.ratings import RatingSummary, RubricScores
from milepost.trajectory.summary import left_out, skipped_lines

QUALITIES = ("distinct_2", "repeated_4gram_fraction")
"""Of a sample's `quality`; their means over the prompts of a step are curves."""

AVERAGE = "average"
"""Of all criteria of the rubric, as one more criterion."""


def course_of(trajectory: Trajectory, *, ratings: RatingSummary | None = None) -> Course:
    """All curves of a run.

    Args:
        trajectory: what the run's files say.
        ratings: of its samples; None where there are none.
    """
    config, tokens = trajectory.manifest.config, TokenCount(trajectory)
    curves = _event_curves(trajectory.steps, STEP_METRICS, tokens)
    curves |= _event_curves(trajectory.validation, VALIDATION_METRICS, tokens)
    for series in main_series(trajectory.benchmarks):
        curves |= _benchmark_curves(series, tokens)
    curves |= _quality_curves(other_samples(trajectory), tokens)
    for group, label in labelled_groups(ratings.groups if ratings else ()):
        curves |= _rubric_curves(group, label, tokens)
    per_token = flops_per_token(
        config.model, sequence_length=config.data.sequence_length, lora=config.lora
    )
    per_step = per_token * config.train.global_batch_tokens
    resumes = {s.resumed_at for s in trajectory.segments if s.resumed_at is not None}
    return Course(
        name=trajectory.name,
        source=f"the run folder {trajectory.layout.name}",
        curves={name: curve for name, curve in curves.items() if len(curve)},
        flops_per_token=None if config.is_finetuning else per_token,
        flops_per_step=per_step if config.is_finetuning else None,
        restarts=tuple(sorted(resumes)),
        notes=tuple(_notes(trajectory)),
    )


def _notes(trajectory: Trajectory) -> Iterator[str]:
    """For a run that is laid over another: of the main one the page's summary says it."""
    if trajectory.is_finetuning:
        yield "A fine-tuning: its tokens and losses are of answers alone, its base is not counted."
    for name, count in trajectory.num_bad_lines.items():
        yield f"{skipped_lines(count, name=name)}."
    yield from left_out(trajectory)


class TokenCount:
    """Target tokens that the model of a run had seen at a step.

    A step that does not say has seen as many more than the last one before it that does, as the
    recipe's global batch makes of the steps between.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        points = [p for p in trajectory.steps.points("tokens_seen") if 0 <= p[1] <= MAX_TOKENS]
        self._steps = np.array([0, *(step for step, _ in points)], dtype=np.float64)
        self._tokens = np.array([0, *(tokens for _, tokens in points)], dtype=np.float64)
        self._per_step = trajectory.manifest.config.train.global_batch_tokens

    def at(self, steps: np.ndarray) -> np.ndarray:
        """float64[N] of float64[N] steps, each at least 0."""
        before = np.searchsorted(self._steps, steps, side="right") - 1
        return self._tokens[before] + (steps - self._steps[before]) * self._per_step


def labelled_groups(groups: Sequence[RubricScores]) -> list[tuple[RubricScores, str]]:
    """Groups of raters, each with the middle of its metrics' names: its kind where that is enough,
    else its kind and its raters, for two judges are two metrics."""
    counts = Counter(group.rater_kind for group in groups)
    return [
        (g, g.rater_kind if counts[g.rater_kind] == 1 else f"{g.rater_kind}:{g.raters}")
        for g in groups
    ]


def _event_curves(table: Table, metrics: dict[str, str], tokens: TokenCount) -> dict[str, Curve]:
    steps = np.array(table.steps, dtype=np.float64)
    seen = tokens.at(steps)
    curves = {}
    for field, metric in metrics.items():
        # None becomes NaN here.
        values = np.array(table.columns[field], dtype=np.float64)
        known = np.isfinite(values)
        curves[metric] = Curve(
            steps[known], seen[known], values[known], np.full(int(known.sum()), np.nan)
        )
    return curves


def score_curve(series: Series, metric: str, tokens: TokenCount) -> Curve:
    """The scores of one metric, empty where the series has none.

    Args:
        series: of one benchmark and setting.
        metric: "acc" or "acc_norm".
        tokens: of the run, for records that do not count them.
    """
    points = series.points(metric)
    said = {e.step: e.tokens_seen for e in series.evaluations}
    steps = np.array([step for step, _ in points], dtype=np.float64)
    seen = np.array([said[step] for step, _ in points], dtype=np.float64)
    return Curve(
        steps=steps,
        tokens=np.where(np.isnan(seen), tokens.at(steps), seen),
        values=np.array([score.value for _, score in points], dtype=np.float64),
        stderrs=np.array([score.stderr for _, score in points], dtype=np.float64),
    )


def _benchmark_curves(series: Series, tokens: TokenCount) -> dict[str, Curve]:
    benchmark = series.setting.benchmark
    return {
        benchmark_metric(benchmark, metric): score_curve(series, metric, tokens)
        for metric in METRICS
    }


def _quality_curves(samples: Iterable[dict[str, Any]], tokens: TokenCount) -> dict[str, Curve]:
    """Means over prompts; of one way of decoding and of the prompts that were sampled at the most
    steps, since other prompts at one step would move its mean."""
    found: dict[str, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    for sample in samples:
        step, prompt = whole(sample.get("step")), text(sample.get("prompt"))
        quality = sample.get("quality")
        if step is None or prompt is None or not isinstance(quality, dict):
            continue
        key = ("decoding", "adapter", "seed")
        found[json.dumps([sample.get(k) for k in key], sort_keys=True)][prompt][step] = quality
    if not found:
        return {}
    by_prompt = max(found.values(), key=lambda group: max(map(len, group.values())))
    most = max(map(len, by_prompt.values()))
    chosen = [by_step for by_step in by_prompt.values() if len(by_step) == most]
    return {f"samples/{name}": _mean_curve(chosen, name, tokens) for name in QUALITIES}


def _mean_curve(groups: list[dict[int, Any]], name: str, tokens: TokenCount) -> Curve:
    values: dict[int, list[float]] = defaultdict(list)
    for by_step in groups:
        for step, quality in by_step.items():
            value = finite(quality.get(name))
            if value is not None:
                values[step].append(value)
    return _curve([(step, float(np.mean(values[step]))) for step in sorted(values)], tokens)


def _rubric_curves(group: RubricScores, label: str, tokens: TokenCount) -> dict[str, Curve]:
    scores = {criterion: list(means) for criterion, means in group.means.items()}
    scores[AVERAGE] = list(group.averages)
    return {
        rubric_metric(label, criterion): _curve(
            [(s, v) for s, v in zip(group.steps, values, strict=True) if v is not None], tokens
        )
        for criterion, values in scores.items()
    }


def _curve(points: Sequence[tuple[int, float]], tokens: TokenCount) -> Curve:
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([value for _, value in points], dtype=np.float64)
    return Curve(steps, tokens.at(steps), values, np.full(len(points), np.nan))
