"""A figure as SVG inside a page: small, sharp at any size, in the page's font and colours, light or dark."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from cxr.figures.style import BLACK, BLUE, GREEN, VERMILLION, drawn, title_of

# Colour in a figure -> the page's variable for it. Other colours are readable on light and on dark.
VARIABLES = {
    BLACK.lower(): "ink",
    "#ffffff": "paper",
    "#737373": "muted",
    "#b2b2b2": "bar",
    "#b3b3b3": "bar",
    "#d9d9d9": "grid",
    "#e0e0e0": "shade",
    "#ebebeb": "shade",
    "#fbefc4": "pale",
    BLUE.lower(): "blue",
    VERMILLION.lower(): "vermillion",
    GREEN.lower(): "green",
}
LARGEST = 150_000  # characters; a picture of thousands of points is smaller as pixels
_HEAD = re.compile(r"^.*?<svg[^>]*>", re.DOTALL)
_STYLE = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_FAMILY = re.compile(r"font-family: [^;\"]*;? ?")


def svg_of(figure: Figure, name: str) -> str | None:
    """The figure without its title as an `<svg>` element for an HTML page; None if it shows images, or is too large.

    The page defines `--ink` and the other `VARIABLES`, and has no other figure of that `name`. The figure is laid out
    as for its PNG, and changed: draw no other picture of it afterwards.
    """
    if any(axes.images for axes in figure.axes):
        return None
    drawn(figure)
    figure.set_layout_engine("none")  # it is laid out; again takes half of the time
    top = _title_height(figure)
    text = _inline(_svg(figure, name))
    if len(text) > LARGEST:
        return None
    width, height = (72 * float(side) for side in figure.get_size_inches())
    view = f"0 {top:.1f} {width:.1f} {height - top:.1f}"
    return f'<svg viewBox="{view}" width="{width * 4 / 3:.0f}">{text}</svg>'


def _svg(figure: Figure, name: str) -> str:
    """As matplotlib writes it, its texts as text; the names of clip paths depend on `name`."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas: Any = FigureCanvasSVG(figure)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        canvas.print_svg(buffer, metadata=nothing)
    return buffer.getvalue()


def _inline(svg: str) -> str:
    """The content of an SVG file as it can stand in a page: names of its own, colours and font of the page."""
    text = _HEAD.sub("", _STYLE.sub("", svg)).replace("</svg>", "")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href", "href")
    text = _FAMILY.sub("", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), text)
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _variable(color: str) -> str:
    return f"var(--{VARIABLES[color]})" if color in VARIABLES else color


def _title_height(figure: Figure) -> float:
    """Hide the title, which the page has as a caption; returns the height in points that it leaves empty."""
    title = title_of(figure)
    if title is None or not title.get_text():
        return 0.0
    bottom = figure.bbox.height - title.get_window_extent().y0
    title.set_visible(False)
    return 72.0 / figure.dpi * float(bottom)
