"""SVG drawings that take their colors and fonts from the page.

The same drawing gives the same bytes: no dates, no random ids, no settings of the user.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.core.units import format_count
from milepost.trajectory.figures.scale import Scale

# Colors that stand for the page's; replaced by its variables, so that one SVG serves light,
# dark and paper.
PLACEHOLDERS = {
    "line": "#010101",
    "mark": "#020202",
    "muted": "#030303",
    "grid": "#040404",
    "tick": "#050505",
    "paper": "#060606",
    "ink": "#0c0c0c",
    "course-2": "#070707",
    "course-3": "#080808",
    "course-4": "#090909",
    "course-5": "#0a0a0a",
    "course-6": "#0b0b0b",
}

LEFT, RIGHT, TOP, BOTTOM = 52.5, 6.3, 21.6, 38.0
"""Room around the axes for their numbers, in units of the drawing area."""

POINTS_PER_INCH = 72
"""With it a unit of the drawing area is a unit of the SVG."""


@dataclass(frozen=True)
class Frame:
    """What is around a drawing.

    Attributes:
        key: begins every id in it; letters and digits.
        title: what it shows; text.
        description: the numbers, for those who do not see it; text.
        width, height: of the drawing area, in units that are about pixels on a phone.
        top: of it, above the axes.
        right: of it, beside the axes.
    """

    key: str
    title: str
    description: str
    width: int
    height: int
    top: float = TOP
    right: float = RIGHT


@dataclass(frozen=True)
class Drawing:
    """A drawing, and where in it things lie.

    Attributes:
        svg: an element for the page.
        transform: matplotlib's, from values to units with the origin at the bottom left.
    """

    svg: str
    frame: Frame
    transform: Any

    def places(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64[N] twice: units from the left and from the top of the SVG."""
        units = self.transform.transform(np.stack([x, y], axis=1))
        return units[:, 0], self.frame.height - units[:, 1]


def draw_svg(frame: Frame, *, draw: Callable[[Any], None]) -> Drawing:
    """An SVG element for the page.

    Args:
        frame: what is around it.
        draw: draws on matplotlib axes, in the colors of `PLACEHOLDERS`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    width, height = frame.width, frame.height
    # The user's own matplotlib settings must not reach the report. A letter that matplotlib's
    # font lacks is drawn by the reader's: no warning.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS | {"svg.hashsalt": f"milepost-{frame.key}"})
        size = (width / POINTS_PER_INCH, height / POINTS_PER_INCH)
        figure = Figure(figsize=size, dpi=POINTS_PER_INCH)
        figure.subplots_adjust(
            left=LEFT / width,
            right=1 - frame.right / width,
            top=1 - frame.top / height,
            bottom=BOTTOM / height,
        )
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        transform = axes.transData.frozen()
    return Drawing(_for_the_page(buffer.getvalue(), frame), frame, transform)


_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    # A dollar in a name is a dollar.
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": PLACEHOLDERS["grid"],
    "axes.labelcolor": PLACEHOLDERS["muted"],
    "axes.labelsize": 9.5,
    "axes.labelpad": 3,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PLACEHOLDERS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": PLACEHOLDERS["muted"],
    "ytick.color": PLACEHOLDERS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 5,
}


def set_scale(axes: Any, scale: Scale) -> None:
    """The horizontal axis of a drawing."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    if scale.is_log:
        axes.set_xscale("log")
        margin = (scale.last / scale.first) ** 0.02
        axes.set_xlim(scale.first / margin, scale.last * margin)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.minorticks_off()
    else:
        margin = 0.02 * (scale.last - scale.first) or 0.5
        axes.set_xlim(scale.first - margin, scale.last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=scale.axis == "steps"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scale.tick(value)))
    axes.set_xlabel(scale.label + (", logarithmic" if scale.is_log else ""))


def tick_text(value: float) -> str:
    """A number beside an axis: 0.003, 2.5, 12 K, 1e+09."""
    if abs(value) >= 1e12:
        return f"{value:.0e}"
    return format_count(value) if abs(value) >= 10_000 else f"{value:,.6g}".replace("-", "−")


def _for_the_page(svg: str, frame: Frame) -> str:
    """The drawing as an element of the page: named, scalable, with the page's colors and fonts."""
    body = svg[svg.index("<svg") :].strip()
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, flags=re.DOTALL)
    # Matplotlib 3.8 writes one `font` property, later ones write several.
    body = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r" transform=\"rotate\(-0 [^\"]*\"", "", body)
    body = re.sub(r"(id=\"|xlink:href=\"#|url\(#)", rf"\g<1>{frame.key}-", body)
    for name, color in PLACEHOLDERS.items():
        body = body.replace(color, f"var(--{name})")
    head = (
        f'<svg role="img" aria-labelledby="{frame.key}-title {frame.key}-description"'
        f' viewBox="0 0 {frame.width} {frame.height}">'
        f'<title id="{frame.key}-title">{html.escape(frame.title)}</title>'
        f'<desc id="{frame.key}-description">{html.escape(frame.description)}</desc>'
    )
    return head + body[body.index(">") + 1 :]
