"""SVG drawings that take their colors and fonts from the page.

The same drawing gives the same bytes: no dates, no random ids, no settings of the user.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from milepost.core.units import format_count

# Colors that stand for the page's; replaced by its variables, so that one SVG serves light,
# dark and paper.
PLACEHOLDERS = {
    "line": "#010101",
    "mark": "#020202",
    "muted": "#030303",
    "grid": "#040404",
    "tick": "#050505",
    "paper": "#060606",
}

LEFT, RIGHT, TOP, BOTTOM = 52.5, 6.3, 21.6, 25.2
"""Room around the axes for their numbers, in units of the drawing area."""


@dataclass(frozen=True)
class Frame:
    """What is around a drawing.

    Attributes:
        key: begins every id in it; letters and digits.
        title: what it shows; text.
        description: the numbers, for those who do not see it; text.
        width, height: of the drawing area, in units that are about pixels on a phone.
        top: of it, above the axes.
    """

    key: str
    title: str
    description: str
    width: int
    height: int
    top: float = TOP


def draw_svg(frame: Frame, *, draw: Callable[[Any], None]) -> str:
    """An SVG element for the page.

    Args:
        frame: what is around it.
        draw: draws on matplotlib axes, in the colors of `PLACEHOLDERS`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    width, height = frame.width, frame.height
    # The user's own matplotlib settings must not reach the report.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS | {"svg.hashsalt": f"milepost-{frame.key}"})
        figure = Figure(figsize=(width / 72, height / 72))
        figure.subplots_adjust(
            left=LEFT / width,
            right=1 - RIGHT / width,
            top=1 - frame.top / height,
            bottom=BOTTOM / height,
        )
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_the_page(buffer.getvalue(), frame)


_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.edgecolor": PLACEHOLDERS["grid"],
    "axes.labelcolor": PLACEHOLDERS["muted"],
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


def scale_steps(axes: Any, first_and_last: tuple[int, int]) -> None:
    """The horizontal axis of a drawing against steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    first, last = first_and_last
    margin = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


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
