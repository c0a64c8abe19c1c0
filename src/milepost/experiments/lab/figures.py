"""The laboratory's drawings: curves of one seed, and differences from the parent, arm by arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.experiments.lab.measures import (
    NOISE_DEVIATIONS,
    Curve,
    difference,
    noise_between,
    smoothed,
)
from milepost.experiments.lab.results import ArmResult, Results, width_of
from milepost.experiments.lab.wording import name_of, unit_of
from milepost.runs.metric_names import VAL_LOSS
from milepost.trajectory.figures.drawing import PLACEHOLDERS, Frame, draw_svg, tick_text
from milepost.trajectory.figures.strokes import LOOKS, Look

OVERLAID = ("moments", "warmup", "data", "restart", "authors")
"""Arms of the first figure, as many as can be told apart beside the parent."""

WIDE, SMALL = (760, 340), (300, 190)
_AXIS = "steps after the restart"


@dataclass(frozen=True)
class Panel:
    """A drawing with its heading."""

    title: str
    svg: str


@dataclass(frozen=True)
class Overlay:
    """The first figure, with its key."""

    svg: str
    key: list[tuple[str, Look]]
    seed: int


def draw_overlay(results: Results) -> Overlay | None:
    """The validation loss of the first seed: the parent and the arms over it."""
    if not results.parents:
        return None
    seed = min(results.parents)
    lines: list[tuple[str, Curve]] = []
    if (parent := results.parents[seed].curves.get(VAL_LOSS)) is not None:
        lines.append(("Parent, never interrupted", parent))
    for name in OVERLAID:
        found = results.of(name)
        for run in found.runs if found else ():
            if run.seed == seed and VAL_LOSS in run.curves:
                assert found is not None
                lines.append((found.arm.title, run.curves[VAL_LOSS]))
    if len(lines) < 2:
        return None
    told = "; ".join(f"{n}: {c.values[0]:.3f} to {c.values[-1]:.3f}" for n, c in lines)
    frame = Frame("overlay", "Validation loss after the restart", told, *WIDE)

    def draw(axes: Any) -> None:
        for (_, curve), look in reversed(list(zip(lines, LOOKS, strict=False))):
            axes.plot(
                curve.steps,
                curve.values,
                color=PLACEHOLDERS[look.color],
                dashes=look.dashes or (None, None),
                linewidth=2.2 if look is LOOKS[0] else 1.4,
            )
        _set_axes(axes)

    keys = [(name, look) for (name, _), look in zip(lines, LOOKS, strict=False)]
    return Overlay(draw_svg(frame, draw=draw).svg, keys, seed)


def draw_differences(results: Results, metric: str) -> list[Panel]:
    """A panel an arm: every seed's difference from its parent, their mean, the parent's noise."""
    panels = [_panel(found, results, metric) for found in results.arms]
    return [panel for panel in panels if panel is not None]


def _panel(found: ArmResult, results: Results, metric: str) -> Panel | None:
    curves = [
        smoothed(difference(run.curves[metric], parent.curves[metric]), width=width_of(metric))
        for run in found.runs
        if metric in run.curves and metric in (parent := results.parents[run.seed]).curves
    ]
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return None
    noise = np.mean(
        [
            noise_between(
                results.parents[run.seed].curves[metric],
                width=width_of(metric),
                are_apart=found.arm.has_other_batches,
            )
            for run in found.runs
            if metric in results.parents[run.seed].curves
        ]
    )
    limit = NOISE_DEVIATIONS * float(noise)
    mean = _mean_curve(curves)
    told = (
        f"{found.arm.title}, {name_of(metric)} less the parent's in {unit_of(metric)}: mean of "
        f"{len(curves)} seeds {mean.values[0]:+.3f} at first, highest {mean.values.max():+.3f}, "
        f"last {mean.values[-1]:+.3f}; noise {limit:.3f} either way."
    )
    key = f"{found.arm.name}{metric.replace('/', '').replace('_', '')}"
    frame, color = Frame(key, found.arm.title, told, *SMALL), PLACEHOLDERS["line"]

    def draw(axes: Any) -> None:
        axes.axhspan(-limit, limit, color=PLACEHOLDERS["tick"], alpha=0.22, linewidth=0)
        axes.axhline(0, color=PLACEHOLDERS["muted"], linewidth=0.8)
        for curve in curves:
            axes.plot(curve.steps, curve.values, color=color, linewidth=0.8, alpha=0.5)
        axes.plot(mean.steps, mean.values, color=color, linewidth=1.9)
        _set_axes(axes)
        _set_range(axes, curves, limit=limit)

    return Panel(found.arm.title, draw_svg(frame, draw=draw).svg)


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean where every seed has a value."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = [curve.values[np.isin(curve.steps, steps)] for curve in curves]
    if not len(steps):
        return curves[0]
    return Curve(steps, np.mean(values, axis=0))


def _set_range(axes: Any, curves: Sequence[Curve], *, limit: float) -> None:
    """Room for the noise at least, so that nothing is drawn as a mountain that is none."""
    every = np.concatenate([curve.values for curve in curves])
    low, high = min(float(every.min()), -2 * limit), max(float(every.max()), 2 * limit)
    if low == high:
        low, high = -1e-3, 1e-3
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)


def _set_axes(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    axes.set_xlabel(_AXIS)
