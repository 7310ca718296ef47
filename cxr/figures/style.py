"""Colours, sizes and helpers shared by the figures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

Labels = NDArray[np.integer[Any]]
Counts = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]
Interval = tuple[float, float, float]

# The Okabe-Ito palette, which is safe for the common colour vision deficiencies.
BLUE, VERMILLION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
GREY = "0.45"

# Line style and marker repeat the information of the colour, for greyscale prints.
Style = dict[str, Any]
REFERENCE: Style = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "zorder": 2.5}
CURVE: Style = {"color": BLUE, "linestyle": "-", "linewidth": 2.0}
POINT: Style = {
    "linestyle": "none",
    "marker": "D",
    "color": VERMILLION,
    "markeredgecolor": BLACK,
    "zorder": 3,
}
WIDTH = 7.2  # inches: 864 px at 120 dpi, about the width of figures in the MLflow UI
Z_95 = 1.959964


def _figure(title: str, height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    figure.suptitle(textwrap.fill(title, int(width * 10)), fontsize=12.5)
    return figure


def save_png(figure: Figure, file: Path | BinaryIO) -> None:
    """At the figure's own resolution: the pixels of `savefig`, which draws every figure twice to lay it out."""
    canvas: Any = drawn(figure)
    image = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    image.convert("RGB").save(file, "PNG", compress_level=3)


def drawn(figure: Figure) -> FigureCanvasAgg:
    """The canvas on which the figure is drawn in pixels. It is drawn once, however often it is saved."""
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    if not hasattr(canvas, "renderer"):  # nothing is drawn yet, as on pyplot's own
        canvas.draw()  # type: ignore[no-untyped-call]
    return canvas


def title_of(figure: Figure) -> Text | None:
    """The title of a figure, if it has one."""
    return next((text for text in figure.texts if text.get_text() == figure.get_suptitle()), None)


def _fix(figure: Figure, left: float, right: float, bottom: float, top: float = 0.1, **spaces: float) -> None:
    """Place the axes by margins in inches, `top` below the title, where the texts beside them are of known sizes.

    Measuring all texts, as the layout engine does, takes as long as drawing them.
    """
    width, height = map(float, figure.get_size_inches())
    heading = title_of(figure)
    assert heading is not None  # `_figure` has made it
    title = 0.1 + 0.21 * (1 + heading.get_text().count("\n"))
    heading.set_y(1 - 0.1 / height)
    figure.set_layout_engine(None)
    edges = (left / width, bottom / height, 1 - right / width, 1 - (title + top) / height)
    figure.subplots_adjust(*edges, **spaces)


def _unit_square(title: str) -> tuple[Figure, Axes]:
    figure = _figure(title, 7.2, 6.2)
    axes = figure.subplots()
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    _grid(axes)
    return figure, axes


def _grid(axes: Axes) -> None:
    axes.grid(color="0.85", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, columns: int = 1) -> None:
    figure.legend(loc="outside lower center", ncols=columns, fontsize=10, frameon=False)


def _number(value: float, spec: str = ".3f", unit: str = "") -> str:
    return f"{value:{spec}}{unit}" if np.isfinite(value) else "n/a"


def _interval(interval: Interval, name: str = "95% CI ") -> str:
    value, low, high = interval
    if not np.isfinite([low, high]).all():
        return _number(value)
    return f"{_number(value)} ({name}{low:.3f} to {high:.3f})"


def _require_both_classes(labels: Labels) -> None:
    found = sorted(set(np.unique(labels).tolist()))
    if found != [0, 1]:
        raise ValueError(f"the curve needs labels of both classes, 0 and 1; found only {found}")


def _epoch_axis(axes: Axes, epochs: pd.Series[int]) -> None:
    axes.set_xlabel("epoch (counted from 0)")
    axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def _draw_matrix(axes: Axes, values: NDArray[Any], texts: Sequence[str], largest: int) -> None:
    shades = colormaps["Blues"](np.nan_to_num(values) / largest)
    axes.imshow(shades)
    size = 16 if len(values) < 3 else max(4, 33 / len(values))
    for (row, column), text in zip(np.ndindex(values.shape), texts, strict=True):
        luminance = shades[row, column, :3] @ (0.299, 0.587, 0.114)
        color = "white" if luminance < 0.55 else "black"
        axes.text(column, row, text, color=color, ha="center", va="center", fontsize=size)


def _wilson(positives: Counts, counts: Counts) -> tuple[Floats, Floats]:
    """The bounds of the 95% Wilson score interval of each ``positives / counts``."""
    rate, shrink = positives / counts, 1 + Z_95**2 / counts
    centre = (rate + Z_95**2 / (2 * counts)) / shrink
    half = Z_95 * np.sqrt(rate * (1 - rate) / counts + Z_95**2 / (4 * counts**2)) / shrink
    return centre - half, centre + half
