"""Figures of more than two classes, each against the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from sklearn import metrics

from cxr.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    REFERENCE,
    VERMILLION,
    Floats,
    Interval,
    Labels,
    _interval,
    _legend_below,
    _unit_square,
)

# Colour and line style, so that eight curves can be told apart in grey, too (the Okabe-Ito palette).
LOOKS = [
    (color, line)
    for line in ("-", "--", "-.", ":")
    for color in (BLUE, VERMILLION, GREEN, BLACK, "#CC79A7", "#E69F00", "#56B4E9", GREY)
]


def roc_curves(labels: Labels, probabilities: Floats, classes: Sequence[tuple[str, Interval]], title: str) -> Figure:
    """True positive rate against false positive rate of each class against the rest.

    ``labels`` [n] and ``probabilities`` [n, k]; ``classes`` has the name of each class and its ROC-AUC with the 95%
    interval. Raises ValueError if a class has no image.
    """
    if set(np.unique(labels).tolist()) != set(range(len(classes))):
        raise ValueError(f"the curves need labels of all {len(classes)} classes")
    figure, axes = _unit_square(title)
    axes.plot([0, 1], [0, 1], label="chance", **REFERENCE)
    for index, (name, area) in enumerate(classes):
        false_positive, true_positive, _ = metrics.roc_curve(labels == index, probabilities[:, index])
        color, line = LOOKS[index % len(LOOKS)]
        label = f"{name} against the rest: AUC {_interval(area)}"
        axes.plot(false_positive, true_positive, color=color, linestyle=line, linewidth=2.0, label=label)
    axes.set_xlabel("false positive rate (1 - specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")
    _legend_below(figure)
    return figure
