"""A small panel for each benchmark: accuracy against steps, with what guessing would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from milepost.trajectory.benchmarks import METRICS, Score, Series
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.drawing import PLACEHOLDERS, Frame, draw_svg, scale_steps

WIDTH, HEIGHT, TOP = 340, 206, 6
MAX_PANELS = 24
MAX_MARKED_POINTS = 40

_STYLES: dict[str, dict[str, Any]] = {
    "acc_norm": {"color": PLACEHOLDERS["line"], "linestyle": "-", "marker": "o"},
    "acc": {"color": PLACEHOLDERS["mark"], "linestyle": "--", "marker": "s"},
}
"""No two metrics differ by color alone."""


@dataclass(frozen=True)
class BenchmarkPanel:
    """A panel ready for the page.

    Attributes:
        key: of its ids.
        title: the benchmark.
        words: how it was scored.
        latest: its last score in words.
        description: the numbers, for those who do not see the drawing.
        svg: the drawing.
    """

    key: str
    title: str
    words: str
    latest: str
    description: str
    svg: str


def draw_benchmarks(trajectory: Trajectory) -> list[BenchmarkPanel]:
    """A panel a series, the first `MAX_PANELS`."""
    shown = trajectory.benchmarks[:MAX_PANELS]
    steps = trajectory.first_and_last_step if shown else (0, 0)
    return [_panel(series, number=n, steps=steps) for n, series in enumerate(shown, start=1)]


def _panel(series: Series, *, number: int, steps: tuple[int, int]) -> BenchmarkPanel:
    latest, title = series.latest, series.setting.name
    description = describe(series)
    frame = Frame(f"benchmark{number}", title, description, WIDTH, HEIGHT, top=TOP)
    return BenchmarkPanel(
        key=frame.key,
        title=title,
        words=series.words,
        latest=f"{latest.main_metric} {latest.main_score} at step {latest.step:,}",
        description=description,
        svg=draw_svg(frame, draw=lambda axes: _draw(axes, series, steps)),
    )


def describe(series: Series) -> str:
    """The numbers of a panel in words: first, highest and last of each metric, and guessing."""
    parts = []
    for metric in METRICS:
        points = series.points(metric)
        if not points:
            continue
        if len(points) == 1:
            parts.append(f"{metric} {_at(points[0])}, the only value")
            continue
        highest = max(points, key=lambda point: point[1].value)
        told = f"first {_at(points[0])}, highest {_at(highest)}, last {_at(points[-1])}"
        parts.append(f"{metric}, {len(points):,} values: {told}")
    levels = [f"{name} {100 * value:.1f} %" for name, value in _levels(series)]
    return f"{series.setting.name} ({series.words}). {'; '.join([*parts, *levels])}."


def _at(point: tuple[int, Score]) -> str:
    return f"{point[1]} at step {point[0]:,}"


def _levels(series: Series) -> list[tuple[str, float]]:
    latest = series.latest
    pairs = (("chance", latest.chance), ("majority", latest.majority))
    return [(name, value) for name, value in pairs if value is not None]


def _draw(axes: Any, series: Series, steps: tuple[int, int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    scale_steps(axes, steps)
    for metric in METRICS:
        if points := series.points(metric):
            _draw_metric(axes, points, metric=metric)
    for name, value in _levels(series):
        _draw_level(axes, name, value, is_right=_is_right_free(series, value, steps))
    axes.margins(y=0.16)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _draw_metric(axes: Any, points: Sequence[tuple[int, Score]], *, metric: str) -> None:
    style = _STYLES[metric]
    steps = [step for step, _ in points]
    values = [score.value for _, score in points]
    errors = [score.stderr or 0.0 for _, score in points]
    low = [value - error for value, error in zip(values, errors, strict=True)]
    high = [value + error for value, error in zip(values, errors, strict=True)]
    if len(points) == 1:  # a band needs two
        axes.vlines(steps, low, high, color=style["color"], linewidth=1.2, gid=f"error-{metric}")
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
    size = 4 if len(points) <= MAX_MARKED_POINTS else 0
    axes.plot(steps, values, linewidth=1.6, markersize=size, **style)


def _is_right_free(series: Series, level: float, steps: tuple[int, int]) -> bool:
    """Whether a label at this height meets the curves at the right end less than at the left."""
    middle = sum(steps) / 2
    points = [point for metric in METRICS for point in series.points(metric)]
    right, left = (
        min(
            (abs(score.value - level) for step, score in points if (step > middle) is is_right),
            default=1.0,
        )
        for is_right in (True, False)
    )
    return right >= left


def _draw_level(axes: Any, name: str, value: float, *, is_right: bool) -> None:
    """A line across the drawing; chance is labeled below its line, majority above."""
    is_below = name == "chance"
    dashes = (1, 2) if is_below else (6, 2, 1, 2)
    axes.axhline(value, color=PLACEHOLDERS["muted"], linewidth=1, dashes=dashes)
    axes.annotate(
        f"{name} {100 * value:.1f} %",
        (1 if is_right else 0, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3 if is_below else 3),
        textcoords="offset points",
        ha="right" if is_right else "left",
        va="top" if is_below else "bottom",
        size=9.5,
        color=PLACEHOLDERS["muted"],
        # A curve may pass here: it stays to be seen, and the number to be read.
        bbox={"facecolor": PLACEHOLDERS["paper"], "alpha": 0.7, "linewidth": 0, "pad": 0.8},
    )
