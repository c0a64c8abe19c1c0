"""A small panel for each benchmark: accuracy, what guessing would give, and published levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from milepost.runs.metric_names import benchmark_metric
from milepost.trajectory.benchmarks import METRICS, NAMES, Score, Series, main_series
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.figures.drawing import PLACEHOLDERS, Frame, draw_svg, set_scale
from milepost.trajectory.figures.hover import Hover, hover_of
from milepost.trajectory.figures.levels import Level, draw_levels, set_range
from milepost.trajectory.figures.panel_kinds import percent
from milepost.trajectory.figures.panels import at, percent_tick
from milepost.trajectory.figures.scale import Scale
from milepost.trajectory.figures.strokes import (
    LOOKS,
    ROOM_FOR_LABELS,
    Look,
    Stroke,
    draw_stroke,
    label_ends,
    stroke_of,
)
from milepost.trajectory.run_course import TokenCount, score_curve
from milepost.trajectory.subject import Subject

WIDTH, HEIGHT, TOP = 340, 218, 6

WIDTH_OF_SEVERAL = WIDTH + 80
"""Where several courses are drawn, whose names stand beside the axes."""

MAX_PANELS = 24

CHANCES = {"hellaswag": 0.25, "piqa": 0.5, "winogrande": 0.5, "openbookqa": 0.25, "boolq": 0.5}
"""Of sets whose questions all have the same number of choices, for scores without a record."""

_METRIC_LOOKS = {"acc_norm": Look("line"), "acc": Look("mark", (3.7, 1.6), "s")}
"""Of the main course's metrics; no two differ by color alone."""


@dataclass(frozen=True)
class Plot:
    """What one panel draws.

    Attributes:
        benchmark: as the records name it.
        words: how it was scored.
        course: the main one, with the curves of this benchmark and setting.
        others: courses that are laid over it.
        levels: chance, majority and baselines.
    """

    benchmark: str
    words: str
    course: Course
    others: tuple[Course, ...]
    levels: tuple[Level, ...]

    @property
    def title(self) -> str:
        """The benchmark as people call it."""
        return NAMES.get(self.benchmark, self.benchmark)

    def metric(self, name: str) -> str:
        """'eval/hellaswag/acc_norm' of 'acc_norm'."""
        return benchmark_metric(self.benchmark, name)

    @property
    def main_metric(self) -> str:
        """The first of `METRICS` that the panel has a curve for."""
        courses = (self.course, *self.others)
        return next(m for m in METRICS if any(self.metric(m) in c.curves for c in courses))


@dataclass(frozen=True)
class BenchmarkPanel:
    """A panel ready for the page.

    Attributes:
        key: of its ids.
        title: the benchmark.
        words: how it was scored.
        latest: the main course's last score in words; None where it has none.
        description: the numbers, for those who do not see the drawing.
        svg: the drawing; None where nothing has a place on the axis.
        hover: its points for the page's script.
        metrics: that the main course has.
        levels: names of the kinds of lines across: "chance", "majority", "baseline".
    """

    key: str
    title: str
    words: str
    latest: str | None
    description: str
    svg: str | None
    hover: Hover | None
    metrics: frozenset[str]
    levels: frozenset[str]


def plots_of(subject: Subject) -> list[Plot]:
    """A plot a benchmark and setting, in the order of the page."""
    if subject.run is None:
        names = _benchmarks_of(subject.courses)
        return [_plain_plot(subject, name) for name in names]
    main = main_series(subject.run.benchmarks)
    tokens = TokenCount(subject.run)
    own = [
        _series_plot(subject, series, tokens=tokens, is_main=series in main)
        for series in subject.run.benchmarks
    ]
    theirs = _benchmarks_of(subject.others)
    scored = {plot.benchmark for plot in own}
    return own + [_plain_plot(subject, name) for name in theirs if name not in scored]


def draw_benchmarks(plots: Sequence[Plot], *, scale: Scale) -> list[BenchmarkPanel]:
    """A panel a plot, the first `MAX_PANELS`."""
    shown = plots[:MAX_PANELS]
    is_several = any(plot.others for plot in shown)
    return [
        _panel(plot, number=n, scale=scale, is_several=is_several)
        for n, plot in enumerate(shown, start=1)
    ]


def _benchmarks_of(courses: Sequence[Course]) -> list[str]:
    """Benchmarks with an accuracy, the known ones first."""
    parts = {tuple(name.split("/")) for course in courses for name in course.curves}
    found = {p[1] for p in parts if len(p) == 3 and p[0] == "eval" and p[2] in METRICS}
    known = [name for name in NAMES if name in found]
    return known + sorted(found - set(NAMES))


def _plain_plot(subject: Subject, benchmark: str) -> Plot:
    """Of a course that is no run's: nothing is known of the setting."""
    words = "as given by its source" if subject.run is None else "not scored in this run"
    plot = Plot(benchmark, words, subject.course, subject.others, ())
    chance = CHANCES.get(benchmark)
    guessing = () if chance is None else (Level("chance", chance, False),)
    levels = (*guessing, *_baselines(subject.baselines, plot.metric(plot.main_metric)))
    return replace(plot, levels=levels)


def _series_plot(subject: Subject, series: Series, *, tokens: TokenCount, is_main: bool) -> Plot:
    setting, latest = series.setting, series.latest
    curves = {}
    for name in METRICS:
        if series.points(name):
            curves[benchmark_metric(setting.benchmark, name)] = score_curve(series, name, tokens)
    pairs = (("chance", latest.chance), ("majority", latest.majority))
    levels = tuple(Level(name, value, False) for name, value in pairs if value is not None)
    if setting.num_fewshot == 0:  # the published scores are of no solved examples
        metric = benchmark_metric(setting.benchmark, latest.main_metric)
        levels += _baselines(subject.baselines, metric)
    course = subject.course
    own = Course(course.name, course.source, curves, course.flops_per_token, course.flops_per_step)
    others = subject.others if is_main else ()
    return Plot(setting.benchmark, series.words, own, others, levels)


def _baselines(baselines: Sequence[Course], metric: str) -> tuple[Level, ...]:
    """The last value of each baseline that has the metric."""
    found = [(course.name, course.curves.get(metric)) for course in baselines]
    return tuple(Level(name, float(c.values[-1]), True) for name, c in found if c is not None)


def _panel(plot: Plot, *, number: int, scale: Scale, is_several: bool) -> BenchmarkPanel:
    own = [
        stroke
        for name, look in _METRIC_LOOKS.items()
        if (stroke := stroke_of(plot.course, plot.metric(name), scale=scale, look=look, name=name))
    ]
    theirs = [
        stroke
        for course, look in zip(plot.others, LOOKS[1:], strict=False)
        if (stroke := stroke_of(course, plot.metric(plot.main_metric), scale=scale, look=look))
    ]
    description = describe(plot, own, theirs)
    key = f"benchmark{number}"
    frame = Frame(key, plot.title, description, WIDTH, HEIGHT, top=TOP)
    if is_several:
        frame = replace(frame, width=WIDTH_OF_SEVERAL, right=ROOM_FOR_LABELS)
    drawing = None
    if own or theirs:
        drawing = draw_svg(frame, draw=lambda axes: _draw(axes, plot, own, theirs, scale=scale))
    return BenchmarkPanel(
        key=key,
        title=plot.title,
        words=plot.words,
        latest=_latest(own),
        description=description,
        svg=drawing.svg if drawing else None,
        hover=hover_of(drawing, [*own, *theirs], text=percent) if drawing else None,
        metrics=frozenset(stroke.name for stroke in own),
        levels=frozenset("baseline" if v.is_baseline else v.name for v in plot.levels),
    )


def _latest(own: Sequence[Stroke]) -> str | None:
    """The last score of the main metric, where the newest checkpoint has it."""
    if not own:
        return None
    newest = max(own, key=lambda stroke: stroke.x[-1])
    return f"{newest.name} {_score(newest.curve, -1)} {at(newest.curve, -1)}"


def _score(curve: Curve, place: int) -> str:
    stderr = float(curve.stderrs[place])
    return str(Score(float(curve.values[place]), None if np.isnan(stderr) else stderr))


def describe(plot: Plot, own: Sequence[Stroke], theirs: Sequence[Stroke]) -> str:
    """The numbers of a panel in words: first, highest and last of each metric, and the levels."""
    parts = []
    for stroke in (*own, *theirs):
        curve = stroke.curve
        if len(curve) == 1:
            parts.append(f"{stroke.name} {_told(curve, 0)}, the only value")
            continue
        places = ("first", 0), ("highest", int(np.argmax(curve.values))), ("last", -1)
        told = ", ".join(f"{name} {_told(curve, place)}" for name, place in places)
        parts.append(f"{stroke.name}, {len(curve):,} values: {told}")
    parts += [f"{level.name} {percent(level.value)}" for level in plot.levels]
    return f"{plot.title} ({plot.words}). {'; '.join(parts)}."


def _told(curve: Curve, place: int) -> str:
    return f"{_score(curve, place)} {at(curve, place)}"


def _draw(
    axes: Any, plot: Plot, own: Sequence[Stroke], theirs: Sequence[Stroke], *, scale: Scale
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    set_scale(axes, scale)
    strokes = [*own, *theirs]
    for stroke in own:
        _draw_errors(axes, stroke)
    for stroke in strokes:
        draw_stroke(axes, stroke)
    set_range(axes, strokes, plot.levels)
    draw_levels(axes, plot.levels, strokes)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent_tick(value)))
    if plot.others:
        main = [stroke for stroke in own if stroke.name == plot.main_metric]
        named = [Stroke(plot.course.name, s.look, s.x, s.curve, s.line) for s in main]
        label_ends(axes, [*named, *theirs])


def _draw_errors(axes: Any, stroke: Stroke) -> None:
    curve, color = stroke.curve, PLACEHOLDERS[stroke.look.color]
    errors = np.nan_to_num(curve.stderrs)
    low, high = curve.values - errors, curve.values + errors
    if len(curve) == 1:  # a band needs two
        axes.vlines(stroke.x, low, high, color=color, linewidth=1.2, gid=f"error-{stroke.name}")
    if errors.any():
        axes.fill_between(stroke.x, low, high, color=color, alpha=0.18, linewidth=0)
