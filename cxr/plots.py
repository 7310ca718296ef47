"""Figures for the tracked runs: numbers in, a matplotlib ``Figure`` out.

Nothing here logs, saves or touches pyplot's global state, so figures need no closing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn import metrics  # type: ignore[import-untyped,unused-ignore]

Labels = NDArray[np.integer[Any]]
Counts = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]
Interval = tuple[float, float, float]

# Okabe and Ito's colours, which stay apart under the common colour-vision deficiencies.
BLUE, VERMILLION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
GREY = "0.45"

# Line style and marker repeat what the colour says, for grey prints.
Style = dict[str, Any]
TRAIN: Style = {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 4}
VALIDATION: Style = {"color": VERMILLION, "linestyle": "--", "marker": "s", "markersize": 4}
RANKING: Style = {"color": GREEN, "linestyle": ":", "marker": "^", "markersize": 5}
RATE: Style = {"color": BLACK, "linestyle": "-", "marker": ".", "markersize": 6}
REFERENCE: Style = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "zorder": 2.5}
CURVE: Style = {"color": BLUE, "linestyle": "-", "linewidth": 2.0}
POINT: Style = {
    "linestyle": "none",
    "marker": "D",
    "color": VERMILLION,
    "markeredgecolor": BLACK,
    "zorder": 3,
}
BESIDE: Style = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0, "frameon": False}

# Heat to lay over grey: plasma's brightness rises evenly, also to the colour-blind; none at 0, so that the X-ray shows.
_OPACITY = np.linspace(0, 0.6, 256)
HEAT = ListedColormap(np.column_stack([colormaps["plasma"](np.linspace(0, 1, 256))[:, :3], _OPACITY]), "heat")
_HEAT_MEANS = "support for pneumonia (Grad-CAM) in parts of the image's own maximum; a bare X-ray has none"

WIDTH = 7.2  # inches: 864 px at 120 dpi, about what MLflow's page shows
Z_95 = 1.959964


def learning_curves(history: pd.DataFrame, best_epoch: int, title: str) -> Figure:
    """Loss, accuracy with ROC-AUC, and learning rate, one panel each, over all epochs of all phases.

    ``history`` has one row per epoch and the columns epoch (from 0, across phases), phase, train_loss,
    val_loss, train_accuracy, val_accuracy, val_roc_auc and lr. The vertical line is ``best_epoch``, the
    epoch of lowest validation loss; shaded bands tell the phases apart where there is more than one.
    """
    if best_epoch not in set(history["epoch"]):
        raise ValueError(f"best epoch {best_epoch} is not in the history")
    figure = _figure(title, 7.6)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    _draw_series(loss, history, {"train_loss": ("training", TRAIN), "val_loss": ("validation", VALIDATION)})
    _draw_series(
        accuracy,
        history,
        {
            "train_accuracy": ("training\naccuracy", TRAIN),
            "val_accuracy": ("validation\naccuracy", VALIDATION),
            "val_roc_auc": ("validation\nROC-AUC", RANKING),
        },
    )
    _draw_series(rate, history, {"lr": ("learning rate", RATE)})
    _mark_best_epoch(loss, accuracy, rate, history=history, best_epoch=best_epoch)
    _log_rate_axis(rate, history["lr"].to_numpy(dtype=float))
    _mark_phases(loss, accuracy, rate, history=history)
    loss.set_ylabel("loss (mean per image)")
    accuracy.set_ylabel("accuracy, ROC-AUC (0 to 1)")
    rate.set_ylabel("learning rate (log)")
    loss.legend(fontsize=9.5, **BESIDE)
    accuracy.legend(fontsize=9.5, **BESIDE)
    _epoch_axis(rate, history["epoch"])
    figure.align_ylabels()
    return figure


def confusion_matrix(counts: Counts, class_names: Sequence[str], title: str) -> Figure:
    """Images per true class (row) and predicted class (column), as counts and as percent of each row.

    ``counts`` is [2, 2]. A row without images has no rates and shows "n/a".
    """
    figure = _figure(title, 4.1)
    left, right = figure.subplots(1, 2)
    totals = counts.sum(axis=1, keepdims=True)
    rates = np.where(totals > 0, 100.0 * counts / np.maximum(totals, 1), np.nan)
    _draw_matrix(left, counts, [f"{value:,d}" for value in counts.flat], max(int(counts.max()), 1))
    _draw_matrix(right, rates, [_number(value, ".1f", "%") for value in rates.flat], 100)
    left.set_title("Number of images", fontsize=11)
    right.set_title("Percent of the true class", fontsize=11)
    for axes in (left, right):
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.set_xticks(range(len(class_names)), class_names)
        axes.set_yticks(range(len(class_names)), class_names, rotation=90, va="center")
    return figure


def roc_curve(
    labels: Labels, probabilities: Floats, auc: Interval | None, title: str, threshold: float = 0.5
) -> Figure:
    """True against false positive rate over all thresholds, with the point taken at ``threshold``.

    ``labels`` [n] are 0 or 1 and ``probabilities`` [n] are of class 1. ``auc`` is (value, low, high), the
    95% interval; None computes the value and shows no interval. A single-class ``labels`` is a ValueError.
    """
    _require_both_classes(labels)
    false_positive, true_positive, _ = metrics.roc_curve(labels, probabilities)
    area = auc or _without_interval(metrics.roc_auc_score(labels, probabilities))
    called = probabilities >= threshold
    at_x, at_y = float(called[labels == 0].mean()), float(called[labels == 1].mean())
    figure, axes = _unit_square(title)
    axes.plot([0, 1], [0, 1], label="chance", **REFERENCE)
    axes.plot(false_positive, true_positive, label=f"AUC {_interval(area)}", **CURVE)
    point = f"threshold {threshold:.2f}: FPR {at_x:.3f}, TPR {at_y:.3f}"
    axes.plot([at_x], [at_y], label=point, clip_on=False, markersize=9, **POINT)
    axes.set_xlabel("false positive rate (1 - specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")
    _legend_below(figure)
    return figure


def pr_curve(labels: Labels, probabilities: Floats, auc: Interval | None, title: str, threshold: float = 0.5) -> Figure:
    """Precision against recall over all thresholds, with the point taken at ``threshold``.

    Arguments as for `roc_curve`; ``auc`` is here the average precision with its 95% interval. The dashed
    line is the prevalence: the precision of calling every image positive. The point is left out where no
    image reaches the threshold, as precision is then undefined.
    """
    _require_both_classes(labels)
    precision, recall, _ = metrics.precision_recall_curve(labels, probabilities)
    area = auc or _without_interval(metrics.average_precision_score(labels, probabilities))
    prevalence = float(np.mean(labels == 1))
    figure, axes = _unit_square(title)
    axes.axhline(prevalence, label=f"prevalence {prevalence:.3f}", **REFERENCE)
    # Average precision sums steps, so the line drawn is the one that it measures.
    axes.plot(recall, precision, drawstyle="steps-post", label=f"AP {_interval(area)}", **CURVE)
    _mark_precision_recall(axes, labels, probabilities >= threshold, threshold)
    axes.set_xlabel("recall (sensitivity)")
    axes.set_ylabel("precision (positive predictive value)")
    _legend_below(figure)
    return figure


def reliability_diagram(labels: Labels, probabilities: Floats, ece: float, title: str, bins: int = 15) -> Figure:
    """Observed frequency of class 1 against mean predicted probability, and the images in each bin.

    ``labels`` [n] are 0 or 1, ``probabilities`` [n] are of class 1, grouped in ``bins`` of equal width;
    empty bins are left out above. Bars are 95% Wilson intervals; ``ece``, the expected calibration
    error, is only printed. After Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    positives = np.bincount(place[labels == 1], minlength=bins)
    sums = np.bincount(place, weights=probabilities, minlength=bins)
    used = counts > 0
    figure = _figure(title, 7.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], label="perfect calibration", **REFERENCE)
    _draw_frequencies(top, sums[used] / counts[used], positives[used], counts[used], ece)
    top.set(ylabel="observed frequency of class 1", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    _draw_counts(bottom, counts)
    _legend_below(figure, columns=3)
    figure.align_ylabels()
    return figure


def metric_bars(values: Mapping[str, Interval], title: str) -> Figure:
    """One row per metric: a point at its value, a line over its 95% interval, the numbers at the right.

    ``values`` maps a metric's name to (value, low, high); a NaN bound leaves the interval out.
    """
    if not values:
        raise ValueError("no metric to draw")
    figure = _figure(title, 1.3 + 0.36 * len(values))
    axes = figure.subplots()
    for row, interval in enumerate(values.values()):
        value, low, high = interval
        axes.plot([low, high], [row, row], color=BLUE, linewidth=2.5, marker="|", markersize=9)
        axes.plot([value], [row], color=BLACK, marker="o", markersize=7)
        axes.text(1.02, row, _interval(interval, ""), transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("value (point) and 95% interval (line)")
    _grid(axes)
    return figure


def image_grid(images: NDArray[np.uint8], captions: Sequence[str], title: str, columns: int = 6) -> Figure:
    """Grey ``images`` [n, height, width] in rows of ``columns``, each under its caption.

    Black is 0 and white 255 in every image, so that brightness compares between them.
    """
    if len(images) == 0 or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: need as many, at least one")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = min(WIDTH / columns, 2.4)
    lines = [textwrap.fill(caption, max(int(cell * 13), 8)) for caption in captions]
    text = 0.15 * (1 + max(line.count("\n") for line in lines))
    tall = cell * images.shape[1] / images.shape[2]
    figure = _figure(title, 0.6 + rows * (tall + text), max(cell * columns, 4.0))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, line in zip(figure.axes, images, lines, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(line, fontsize=8, pad=3)
    return figure


def explanation_panel(
    images: NDArray[np.uint8], heats: Floats, captions: Sequence[str], title: str, columns: int = 4
) -> Figure:
    """Grey ``images`` [n, s, s] under their ``heats`` [n, s, s], in rows of ``columns``, each under its caption.

    A heat runs from 0, which leaves the X-ray bare, to 1; the bar below says that it compares within an image only.
    """
    if len(heats) != len(images):
        raise ValueError(f"{len(images)} images and {len(heats)} heat maps: need as many")
    figure = image_grid(images, captions, title, columns)
    cells = list(figure.axes)
    for axes, heat in zip(cells, heats, strict=False):
        layer = axes.imshow(heat, cmap=HEAT, vmin=0, vmax=1)
    figure.set_figheight(figure.get_figheight() + 0.65)
    bar = figure.colorbar(layer, ax=cells, location="bottom", aspect=40, shrink=0.8)
    bar.ax.set_facecolor(GREY)  # so that the bar shows its colours as the X-rays do
    bar.ax.tick_params(labelsize=8)
    bar.set_label(textwrap.fill(_HEAT_MEANS, int(figure.get_figwidth() * 13)), fontsize=8.5)
    return figure


def _figure(title: str, height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    figure.suptitle(textwrap.fill(title, int(width * 10)), fontsize=12.5)
    return figure


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


def _without_interval(value: float) -> Interval:
    return float(value), np.nan, np.nan


def _require_both_classes(labels: Labels) -> None:
    found = sorted(set(np.unique(labels).tolist()))
    if found != [0, 1]:
        raise ValueError(f"the curve needs labels of both classes, 0 and 1; found only {found}")


def _draw_series(axes: Axes, history: pd.DataFrame, series: Mapping[str, tuple[str, Style]]) -> None:
    for column, (label, style) in series.items():
        axes.plot(history["epoch"], history[column], label=label, **style)
    axes.margins(y=0.1)
    _grid(axes)


def _epoch_axis(axes: Axes, epochs: pd.Series[int]) -> None:
    axes.set_xlabel("epoch (counted from 0)")
    axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def _log_rate_axis(axes: Axes, rates: Floats) -> None:
    positive = rates[rates > 0]
    if positive.size == 0:
        return
    axes.set_yscale("log")
    # A constant rate would leave a range without a labelled power of ten.
    low, high = np.log10(positive.min()), np.log10(positive.max())
    axes.set_ylim(10.0 ** np.floor(low - 0.2), 10.0 ** np.ceil(high + 0.2))


def _mark_best_epoch(loss: Axes, *others: Axes, history: pd.DataFrame, best_epoch: int) -> None:
    for axes in (loss, *others):
        axes.axvline(best_epoch, color=BLACK, linestyle="-.", linewidth=1.2, zorder=1)
    best = history.loc[history["epoch"] == best_epoch, "val_loss"]
    label = f"epoch {best_epoch}: lowest\nvalidation loss\n({_number(float(best.iloc[0]), '.4f')})"
    loss.plot([best_epoch], best, label=label, markersize=12, markerfacecolor="none", **POINT)


def _phase_spans(history: pd.DataFrame) -> list[tuple[str, int, int]]:
    run = (history["phase"] != history["phase"].shift()).cumsum()
    return [
        (str(rows["phase"].iloc[0]), int(rows["epoch"].min()), int(rows["epoch"].max()))
        for _, rows in history.groupby(run, sort=False)
    ]


def _mark_phases(top: Axes, *others: Axes, history: pd.DataFrame) -> None:
    spans = _phase_spans(history)
    if len(spans) < 2:
        return
    for index, (_, first, last) in enumerate(spans):
        for axes in (top, *others):
            shade = "0.92" if index % 2 == 0 else "white"
            axes.axvspan(first - 0.5, last + 0.5, color=shade, linewidth=0, zorder=0)
    _label_phases(top, spans, epochs=len(history))


def _label_phases(axes: Axes, spans: list[tuple[str, int, int]], epochs: int) -> None:
    width = epochs / 55  # of one character, in epochs: about 55 fit on the panel
    ends: list[float] = []
    for name, first, last in spans:
        middle, half = (first + last) / 2, (len(name) + 2) * width / 2
        # A name wider than its phase goes to the first line above where nothing is in its way.
        line = next((line for line, end in enumerate(ends) if end <= middle - half), len(ends))
        ends[line : line + 1] = [middle + half]
        axes.annotate(
            name,
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + 13 * line),
            textcoords="offset points",
            ha="center",
        )


def _draw_matrix(axes: Axes, values: NDArray[Any], texts: Sequence[str], largest: int) -> None:
    shades = colormaps["Blues"](np.nan_to_num(values) / largest)
    axes.imshow(shades)
    for (row, column), text in zip(np.ndindex(values.shape), texts, strict=True):
        luminance = shades[row, column, :3] @ (0.299, 0.587, 0.114)
        color = "white" if luminance < 0.55 else "black"
        axes.text(column, row, text, color=color, ha="center", va="center", fontsize=16)


def _mark_precision_recall(axes: Axes, labels: Labels, called: NDArray[np.bool_], threshold: float) -> None:
    if not called.any():
        axes.plot([], [], label=f"threshold {threshold:.2f}: no image called positive", markersize=9, **POINT)
        return
    precision, recall = float((labels[called] == 1).mean()), float(called[labels == 1].mean())
    label = f"threshold {threshold:.2f}: precision {precision:.3f}, recall {recall:.3f}"
    axes.plot([recall], [precision], label=label, clip_on=False, markersize=9, **POINT)


def _wilson(positives: Counts, counts: Counts) -> tuple[Floats, Floats]:
    """The bounds of the 95% Wilson score interval of each ``positives / counts``."""
    rate, shrink = positives / counts, 1 + Z_95**2 / counts
    centre = (rate + Z_95**2 / (2 * counts)) / shrink
    half = Z_95 * np.sqrt(rate * (1 - rate) / counts + Z_95**2 / (4 * counts**2)) / shrink
    return centre - half, centre + half


def _draw_frequencies(axes: Axes, predicted: Floats, positives: Counts, counts: Counts, ece: float) -> None:
    low, high = _wilson(positives, counts)
    axes.vlines(predicted, low, high, color=BLUE, linewidth=1.6, label="95% Wilson interval")
    label = f"bins of images (ECE {_number(ece)})"
    axes.plot(predicted, positives / counts, color=BLUE, marker="o", linewidth=1.2, label=label)
    _grid(axes)


def _draw_counts(axes: Axes, counts: Counts) -> None:
    edges = np.linspace(0, 1, len(counts) + 1)
    bars = axes.bar(edges[:-1], counts, width=1 / len(counts), align="edge", color="0.7", edgecolor=BLACK)
    if len(counts) <= 20:
        axes.bar_label(bars, fontsize=8.5, padding=1)
    axes.margins(y=0.2)
    axes.set_xlabel("predicted probability of class 1")
    axes.set_ylabel("images")
