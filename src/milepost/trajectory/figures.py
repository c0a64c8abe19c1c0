"""The six panels of the paper's Figure 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.trajectory.collect import Table, Trajectory
from milepost.trajectory.drawing import PLACEHOLDERS, Frame, draw_svg, scale_steps, tick_text
from milepost.trajectory.lines import Line, line_of

WIDTH, HEIGHT = 420, 240
"""Units of a panel's drawing area; a panel is about this many pixels wide on a phone."""

MAX_MARKED_POINTS = 60
LOG_SCALE_FROM_RATIO = 20
"""Where the highest value is this many times the median, a linear axis shows only the spike."""

MIN_LABEL_DISTANCE = 0.16
"""Of the axis; labels of resumes that are nearer to each other would overlap."""


@dataclass(frozen=True)
class PanelKind:
    """What a panel shows.

    Attributes:
        letter: A to F, as in the paper's Figure 1.
        key: of its files and ids.
        unit: of its values, for people.
        table: the table it draws from.
        field: the column.
        extra_fields: further columns of its CSV.
        text: how one of its values is said.
        from_zero: whether its axis begins at zero.
        absence: what stands in its place where it has no values.
    """

    letter: str
    key: str
    title: str
    unit: str
    table: Callable[[Trajectory], Table]
    field: str
    extra_fields: tuple[str, ...]
    text: Callable[[float], str]
    from_zero: bool = False
    absence: str = "no values yet"


@dataclass(frozen=True)
class Panel:
    """A panel ready for the page.

    Attributes:
        latest: its last value in words, None where there is none.
        description: the numbers, for those who do not see the drawing.
        svg: the drawing; None where it has no values.
        is_log_scale: whether its vertical axis is logarithmic.
        is_binned: whether it shows medians within a band instead of every value.
    """

    kind: PanelKind
    latest: str | None
    description: str
    svg: str | None
    is_log_scale: bool = False
    is_binned: bool = False


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _rate(value: float) -> str:
    return f"{value:.3g}"


def _speed(value: float) -> str:
    return f"{value:,.0f}"


def _steps(trajectory: Trajectory) -> Table:
    return trajectory.steps


PANEL_KINDS = (
    PanelKind(
        "A",
        "validation_loss",
        "Validation loss",
        "nats per token",
        lambda trajectory: trajectory.validation,
        "loss_nats",
        ("bits_per_byte", "tokens", "seconds"),
        _loss,
    ),
    PanelKind(
        "B",
        "hellaswag",
        "HellaSwag",
        "accuracy, length-normalized",
        lambda trajectory: trajectory.hellaswag,
        "acc_norm",
        ("acc_norm_stderr",),
        _loss,
        absence="not evaluated",
    ),
    PanelKind(
        "C",
        "training_loss",
        "Training loss",
        "nats per token",
        _steps,
        "loss_nats",
        ("tokens_seen", "data_step"),
        _loss,
    ),
    PanelKind(
        "D",
        "tokens_per_second",
        "Tokens per second",
        "tokens per second",
        _steps,
        "tokens_per_second",
        ("step_seconds", "mfu_fraction"),
        _speed,
        from_zero=True,
    ),
    PanelKind(
        "E", "learning_rate", "Learning rate", "of each update", _steps, "learning_rate", (), _rate
    ),
    PanelKind(
        "F",
        "gradient_norm",
        "Gradient norm",
        "L2 norm before clipping",
        _steps,
        "grad_norm",
        ("scale",),
        _rate,
    ),
)


def draw_panels(trajectory: Trajectory) -> list[Panel]:
    """All panels of a trajectory, in the paper's order."""
    return [_panel(kind, trajectory) for kind in PANEL_KINDS]


def _panel(kind: PanelKind, trajectory: Trajectory) -> Panel:
    points = kind.table(trajectory).points(kind.field)
    if not points:
        return Panel(kind, latest=None, description=f"{kind.title}: {kind.absence}.", svg=None)
    line = line_of(points)
    is_log = _needs_log_scale([value for _, value in points])
    description = describe(kind, points)
    return Panel(
        kind,
        latest=f"{kind.text(points[-1][1])} at step {points[-1][0]:,}",
        description=description,
        svg=_svg(kind, points, trajectory, line=line, description=description, is_log_scale=is_log),
        is_log_scale=is_log,
        is_binned=line.low is not None,
    )


def describe(kind: PanelKind, points: Sequence[tuple[int, float]]) -> str:
    """The numbers of a panel in words: first, lowest, highest, last."""

    def at(point: tuple[int, float]) -> str:
        return f"{kind.text(point[1])} at step {point[0]:,}"

    if len(points) == 1:
        return f"{kind.title} ({kind.unit}): {at(points[0])}, the only value."
    lowest, highest = (pick(points, key=lambda p: p[1]) for pick in (min, max))
    return (
        f"{kind.title} ({kind.unit}), {len(points):,} values: first {at(points[0])},"
        f" lowest {at(lowest)}, highest {at(highest)}, last {at(points[-1])}."
    )


def _needs_log_scale(values: list[float]) -> bool:
    return min(values) > 0 and max(values) > LOG_SCALE_FROM_RATIO * float(np.median(values))


def _svg(
    kind: PanelKind,
    points: Sequence[tuple[int, float]],
    trajectory: Trajectory,
    *,
    line: Line,
    description: str,
    is_log_scale: bool,
) -> str:
    def draw(axes: Any) -> None:
        _draw_line(axes, line, is_dotted=len(points) <= MAX_MARKED_POINTS)
        _scale(axes, kind, trajectory, is_log_scale=is_log_scale)
        _mark_resumes(axes, trajectory)
        _mark_checkpoints(axes, trajectory)

    return draw_svg(Frame(kind.key, kind.title, description, WIDTH, HEIGHT), draw=draw)


def _draw_line(axes: Any, line: Line, *, is_dotted: bool) -> None:
    color = PLACEHOLDERS["line"]
    if line.low is not None:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
    style = {"marker": "o", "markersize": 4} if is_dotted else {}
    axes.plot(line.x, line.y, color=color, linewidth=1.6, **style)
    axes.plot(line.lone_x, line.lone_y, "o", color=color, markersize=4)


def _scale(axes: Any, kind: PanelKind, trajectory: Trajectory, *, is_log_scale: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    scale_steps(axes, trajectory.first_and_last_step)
    if is_log_scale:
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        if kind.from_zero:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def _mark_resumes(axes: Any, trajectory: Trajectory) -> None:
    resumes: dict[int, list[int]] = {}
    for segment in trajectory.segments:
        if segment.resumed_at is not None:
            resumes.setdefault(segment.resumed_at, []).append(segment.number)
    first, last = axes.get_xlim()
    labeled_until = -1.0
    for step, numbers in sorted(resumes.items()):
        axes.axvline(step, color=PLACEHOLDERS["mark"], linewidth=1, dashes=(3, 2.5), zorder=1)
        place = (step - first) / (last - first)
        if place >= labeled_until and 0 <= place <= 1:
            labeled_until = place + MIN_LABEL_DISTANCE
            _label_resume(axes, place, numbers)


def _label_resume(axes: Any, place: float, numbers: list[int]) -> None:
    """Names the segments that begin at a place of the axis, inside the drawing's width."""
    name = f"segment {numbers[0]}" if len(numbers) == 1 else f"segments {_ranged(numbers)}"
    half = MIN_LABEL_DISTANCE / 2 if len(numbers) == 1 else MIN_LABEL_DISTANCE * 0.75
    axes.text(
        min(max(place, half), 1 - half),
        1.025,
        name,
        transform=axes.transAxes,
        ha="center",
        color=PLACEHOLDERS["mark"],
        size=9.5,
    )


def _ranged(numbers: list[int]) -> str:
    is_run = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]} to {numbers[-1]}" if is_run else f"{numbers[0]}, … {numbers[-1]}"


def _mark_checkpoints(axes: Any, trajectory: Trajectory) -> None:
    steps = [checkpoint.step for checkpoint in trajectory.checkpoints]
    # In the axes' own height, whatever the values: 0 is the horizontal axis. One path for all of
    # them, broken by NaN: a path a tick would be most of the page of a long run.
    x = np.repeat(np.array(steps, dtype=np.float64), 3)
    y = np.tile([0.0, 0.035, np.nan], len(steps))
    across = axes.get_xaxis_transform()
    # Many ticks stay apart only if they are thin.
    width = min(1.2, 150 / max(1, len(steps)))
    axes.plot(x, y, transform=across, color=PLACEHOLDERS["tick"], linewidth=width, gid="ticks")
