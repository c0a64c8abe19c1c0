"""What a panel shows under a pointer, a finger or the arrow keys: values at the drawn points.

The numbers travel as JSON inside the page; `templates/hover.js` reads them. Without a script the
page is whole without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.core.units import format_count
from milepost.trajectory.figures.drawing import Drawing
from milepost.trajectory.figures.strokes import Stroke


@dataclass(frozen=True)
class Hover:
    """The points of one panel.

    Attributes:
        key: of the panel's drawing.
        width, height: of the drawing.
        lines: for JSON, one a stroke: name `n`, places `x` and `y`, values `v` as texts, steps
            `s` and tokens `t`, each None where it is not known.
    """

    key: str
    width: int
    height: int
    lines: list[dict[str, Any]]


def hover_of(drawing: Drawing, strokes: Sequence[Stroke], *, text: Callable[[float], str]) -> Hover:
    """The drawn points of some strokes, with their values as `text` says them."""
    frame = drawing.frame
    lines = [_line(drawing, stroke, text=text) for stroke in strokes]
    return Hover(frame.key, frame.width, frame.height, lines)


def hover_json(hovers: Sequence[Hover]) -> str:
    """JSON that can stand inside a script element."""
    content = {h.key: {"w": h.width, "h": h.height, "lines": h.lines} for h in hovers}
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _line(drawing: Drawing, stroke: Stroke, *, text: Callable[[float], str]) -> dict[str, Any]:
    drawn = ~np.isnan(stroke.line.y)
    x, y = stroke.line.x[drawn], stroke.line.y[drawn]
    is_binned = stroke.line.low is not None
    left, top = drawing.places(x, y)
    errors = np.full(len(x), np.nan) if is_binned else stroke.curve.stderrs
    steps = np.interp(x, stroke.x, stroke.curve.steps)
    tokens = np.interp(x, stroke.x, stroke.curve.tokens)
    return {
        "n": f"{stroke.name}, median" if is_binned else stroke.name,
        "x": [round(float(place), 1) for place in left],
        "y": [round(float(place), 1) for place in top],
        "v": [_with_error(*pair, text=text) for pair in zip(y, errors, strict=True)],
        "s": [None if np.isnan(step) else round(float(step)) for step in steps],
        "t": [None if np.isnan(count) else format_count(count) for count in tokens],
    }


def _with_error(value: float, error: float, *, text: Callable[[float], str]) -> str:
    """'27.3 %' or '27.3 ± 0.4 %': errors belong to accuracies only."""
    told = text(value)
    if np.isnan(error):
        return told
    return f"{told.removesuffix(' %')} ± {100 * error:.1f} %"
