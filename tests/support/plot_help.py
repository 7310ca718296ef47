"""Helpers for tests of figures: an example with known curves, and access to the drawn artists."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
PROBABILITIES = np.array([0.1, 0.2, 0.3, 0.9, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0])


def save(figure: Figure) -> None:
    """Draw in full; pytest's -W error turns a layout or glyph warning into a failure."""
    figure.savefig(io.BytesIO(), format="png")


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def line(axes: Axes, start: str) -> Line2D:
    (found,) = [line for line in axes.lines if str(line.get_label()).startswith(start)]
    return found
