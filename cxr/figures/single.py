"""Figures of single runs: metrics and arrays in, a matplotlib ``Figure`` out.

Nothing here logs, saves or uses pyplot's global state, so figures need not be closed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn import metrics

from cxr.evaluation.metrics import ECE_BINS, expected_calibration_error
from cxr.figures.strategies import ZOOMED, _column, _last_row, _legend, _name, _panels
from cxr.figures.style import (
    BLACK,
    BLUE,
    CURVE,
    GREEN,
    GREY,
    POINT,
    REFERENCE,
    VERMILLION,
    WIDTH,
    Counts,
    Floats,
    Interval,
    Labels,
    Style,
    _draw_matrix,
    _epoch_axis,
    _figure,
    _fix,
    _grid,
    _interval,
    _legend_below,
    _number,
    _require_both_classes,
    _unit_square,
    _wilson,
)

TRAIN: Style = {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 4}
VALIDATION: Style = {"color": VERMILLION, "linestyle": "--", "marker": "s", "markersize": 4}
RANKING: Style = {"color": GREEN, "linestyle": ":", "marker": "^", "markersize": 5}
RATE: Style = {"color": BLACK, "linestyle": "-", "marker": ".", "markersize": 6}
LEGEND_RIGHT: Style = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0, "frameon": False}

# Overlay for grey images: plasma is perceptually uniform and colour-blind safe; transparent at 0 to show the X-ray.
_OPACITY = np.linspace(0, 0.6, 256)
HEAT = ListedColormap(np.column_stack([colormaps["plasma"](np.linspace(0, 1, 256))[:, :3], _OPACITY]), "heat")
_HEAT_LABEL = "Grad-CAM evidence for the class, relative to the maximum of each image; transparent: none"


def learning_curves(history: pd.DataFrame, best_epoch: int, title: str) -> Figure:
    """Loss, accuracy with ROC-AUC, and learning rate, one panel each, over all epochs of all phases.

    ``history`` has one row per epoch and the columns epoch (from 0, across phases), phase, train_loss,
    val_loss, train_accuracy, val_accuracy, val_roc_auc and lr. The vertical line is ``best_epoch``, the
    epoch of lowest validation loss; shaded bands separate the phases if there is more than one.
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
    loss.legend(fontsize=9.5, **LEGEND_RIGHT)
    accuracy.legend(fontsize=9.5, **LEGEND_RIGHT)
    _epoch_axis(rate, history["epoch"])
    figure.align_ylabels()
    return figure


def confusion_matrix(counts: Counts, class_names: Sequence[str], title: str) -> Figure:
    """Images per true class (row) and predicted class (column), as counts and as percent of each row.

    ``counts`` is [k, k]. A row without images has no rates and shows "n/a".
    """
    many = len(class_names) > 3 or len(class_names) * max(map(len, class_names)) > 36
    figure = _figure(title, 4.6 if many else 4.1)
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
        axes.set_xticks(range(len(class_names)), class_names, rotation=90 if many else 0)
        axes.set_yticks(range(len(class_names)), class_names, rotation=0 if many else 90, va="center")
    if not many:  # else the margins depend on the names
        _fix(figure, 0.65, 0.2, 0.6, 0.35, wspace=0.28)
    return figure


def roc_curve(
    labels: Labels, probabilities: Floats, auc: Interval | None, title: str, threshold: float = 0.5
) -> Figure:
    """True positive rate against false positive rate over all thresholds, with the point at ``threshold`` marked.

    ``labels`` [n] are 0 or 1 and ``probabilities`` [n] are of class 1. ``auc`` is (value, low, high), the
    95% interval; None computes the value and shows no interval. Raises ValueError if ``labels`` has only one class.
    """
    _require_both_classes(labels)
    false_positive, true_positive, _ = metrics.roc_curve(labels, probabilities)
    area = auc or _without_interval(metrics.roc_auc_score(labels, probabilities))
    predicted = probabilities >= threshold
    at_x, at_y = float(predicted[labels == 0].mean()), float(predicted[labels == 1].mean())
    figure, axes = _unit_square(title)
    axes.plot([0, 1], [0, 1], label="chance", **REFERENCE)
    axes.plot(false_positive, true_positive, label=f"AUC {_interval(area)}", **CURVE)
    point = f"threshold {threshold:.2f}: FPR {at_x:.3f}, TPR {at_y:.3f}"
    axes.plot([at_x], [at_y], label=point, clip_on=False, markersize=9, **POINT)
    axes.set_xlabel("false positive rate (1 - specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")
    _legend_below(figure)
    _fix(figure, 0.75, 0.2, 1.3)
    return figure


def pr_curve(labels: Labels, probabilities: Floats, auc: Interval | None, title: str, threshold: float = 0.5) -> Figure:
    """Precision against recall over all thresholds, with the point at ``threshold`` marked.

    Arguments as for `roc_curve`; ``auc`` is here the average precision with its 95% interval. The dashed
    line is the prevalence: the precision of predicting every image positive. The point is omitted if no
    image reaches the threshold, as precision is then undefined.
    """
    _require_both_classes(labels)
    precision, recall, _ = metrics.precision_recall_curve(labels, probabilities)
    area = auc or _without_interval(metrics.average_precision_score(labels, probabilities))
    prevalence = float(np.mean(labels == 1))
    figure, axes = _unit_square(title)
    axes.axhline(prevalence, label=f"prevalence {prevalence:.3f}", **REFERENCE)
    # Drawn as steps, because average precision is a sum of steps.
    axes.plot(recall, precision, drawstyle="steps-post", label=f"AP {_interval(area)}", **CURVE)
    _mark_precision_recall(axes, labels, probabilities >= threshold, threshold)
    axes.set_xlabel("recall (sensitivity)")
    axes.set_ylabel("precision (positive predictive value)")
    _legend_below(figure)
    _fix(figure, 0.75, 0.2, 1.3)
    return figure


def reliability_diagram(labels: Labels, probabilities: Floats, ece: float, title: str, bins: int = 15) -> Figure:
    """Observed frequency of class 1 against mean predicted probability, and the number of images in each bin.

    ``labels`` [n] are 0 or 1, ``probabilities`` [n] are of class 1, grouped in ``bins`` of equal width;
    empty bins have no point. Bars are 95% Wilson intervals; ``ece``, the expected calibration error,
    is only printed. After Guo et al., On Calibration of Modern Neural Networks, 2017.
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
    """One row per metric: a point at its value, a line for its 95% interval, and both printed at the right.

    ``values`` maps the name of a metric to (value, low, high); with a NaN bound no interval is drawn.
    """
    if not values:
        raise ValueError("no metric to plot")
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


def selective_accuracy(coverages: Floats, curve: Mapping[str, Floats], abstained: float, title: str) -> Figure:
    """Accuracy of the most certain images against the share that is kept, with its 95% interval as a band.

    ``coverages`` [c] rise from above 0 to 1; ``curve`` has accuracy, low and high, each [c], NaN for no interval. The
    vertical line is at the share kept when the model abstains from ``abstained`` of the images.
    """
    figure = _figure(title, 4.6)
    axes = figure.subplots()
    if np.isfinite(curve["low"]).all():
        axes.fill_between(coverages, curve["low"], curve["high"], color=BLUE, alpha=0.2, label="95% interval")
    axes.plot(coverages, curve["accuracy"], marker="o", markersize=4, label="accuracy of what is kept", **CURVE)
    axes.axvline(1 - abstained, label=f"model abstains from {abstained:.1%}", **REFERENCE)
    axes.set_xlim(0, 1.01)
    axes.set_xlabel("coverage: share of images kept, the most certain first")
    axes.set_ylabel("accuracy (0 to 1)")
    _grid(axes)
    _legend_below(figure)
    _fix(figure, 0.85, 0.2, 1.3)
    return figure


def image_grid(
    images: NDArray[np.uint8], captions: Sequence[str], title: str, columns: int = 6, below: float = 0.1
) -> Figure:
    """Grey ``images`` [n, height, width] in rows of ``columns``, each under its caption, with a margin ``below`` in
    inches.

    Black is 0 and white 255 in every image, so that brightness is comparable between them.
    """
    if len(images) == 0 or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: need equal numbers, at least one")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = min(WIDTH / columns, 2.4)
    lines = [textwrap.fill(caption, max(int(cell * 13), 8)) for caption in captions]
    text = 0.08 + 0.13 * (1 + max(line.count("\n") for line in lines))
    tall = cell * images.shape[1] / images.shape[2]
    figure = _figure(title, 0.5 + rows * (tall + text) + below, max(cell * columns, 4.0))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, line in zip(figure.axes, images, lines, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(line, fontsize=8, pad=3)
    _fix(figure, 0.1, 0.1, below, text, wspace=0.05, hspace=text / tall)
    return figure


def explanation_panel(
    images: NDArray[np.uint8], heats: Floats, captions: Sequence[str], title: str, columns: int = 4
) -> Figure:
    """Grey ``images`` [n, s, s] overlaid with heat maps ``heats`` [n, s, s], in rows of ``columns``, each with its
    caption.

    Heat maps range from 0 (transparent) to 1; the colour bar notes that they are comparable only within an image.
    """
    if len(heats) != len(images):
        raise ValueError(f"{len(images)} images and {len(heats)} heat maps: need equal numbers")
    figure = image_grid(images, captions, title, columns, below=0.85)
    for axes, heat in zip(figure.axes, heats, strict=False):
        layer = axes.imshow(heat, cmap=HEAT, vmin=0, vmax=1)
    height = float(figure.get_figheight())
    bar = figure.colorbar(layer, cax=figure.add_axes((0.1, 0.6 / height, 0.8, 0.13 / height)), orientation="horizontal")
    bar.ax.set_facecolor(GREY)  # so that the colours match those over the X-rays
    bar.ax.tick_params(labelsize=8)
    bar.set_label(textwrap.fill(_HEAT_LABEL, int(figure.get_figwidth() * 13)), fontsize=8.5)
    return figure


def _without_interval(value: float) -> Interval:
    return float(value), np.nan, np.nan


def _draw_series(axes: Axes, history: pd.DataFrame, series: Mapping[str, tuple[str, Style]]) -> None:
    for column, (label, style) in series.items():
        axes.plot(history["epoch"], history[column], label=label, **style)
    axes.margins(y=0.1)
    _grid(axes)


def _log_rate_axis(axes: Axes, rates: Floats) -> None:
    positive = rates[rates > 0]
    if positive.size == 0:
        return
    axes.set_yscale("log")
    # With a constant rate, the range could contain no labelled power of ten.
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
        # A name that is wider than its phase moves up to the first line where it overlaps no other name.
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


def _mark_precision_recall(axes: Axes, labels: Labels, predicted: NDArray[np.bool_], threshold: float) -> None:
    if not predicted.any():
        axes.plot([], [], label=f"threshold {threshold:.2f}: no positive predictions", markersize=9, **POINT)
        return
    precision, recall = float((labels[predicted] == 1).mean()), float(predicted[labels == 1].mean())
    label = f"threshold {threshold:.2f}: precision {precision:.3f}, recall {recall:.3f}"
    axes.plot([recall], [precision], label=label, clip_on=False, markersize=9, **POINT)


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


def calibration_pair(
    labels: Labels, before: Floats, after: Floats, title: str, bins: int = ECE_BINS, event: str = "class 1"
) -> Figure:
    """Reliability diagrams before and after calibration, each with its ECE and the number of images in each bin.

    ``labels`` [n] are 0 or 1; ``before`` and ``after`` [n] are probabilities of class 1, or of another ``event``,
    grouped in ``bins`` of equal width. Bars are 95% Wilson intervals; empty bins have no point. After Guo et al., On
    Calibration of Modern Neural Networks, 2017.
    """
    if len(labels) == 0:
        raise ValueError("no image to plot")
    figure = _figure(title, 6.0)
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(5, 2))
    for column, (name, probabilities) in enumerate({"before": before, "after": after}.items()):
        ece = expected_calibration_error(labels.astype(np.int64), probabilities.astype(np.float64), bins)
        panels[0, column].set_title(f"{name} calibration: ECE {ece:.4f}", fontsize=11)
        _draw_reliability(panels[0, column], panels[1, column], labels, probabilities, bins)
    figure.supxlabel(f"predicted probability of {event}", y=0.08, fontsize="medium")
    panels[0, 0].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="observed frequency")
    panels[1, 0].set_ylabel("images")
    panels[1, 0].margins(y=0.45)  # room for the rotated counts
    _legend(figure, panels[0, 0].get_legend_handles_labels()[0], columns=3)
    _fix(figure, 0.85, 0.25, 0.95, 0.35, wspace=0.08, hspace=0.08)
    figure.align_ylabels()
    return figure


def folds(table: pd.DataFrame, metrics: Sequence[str], title: str) -> Figure:
    """One panel per metric: its value in each fold, and the mean and standard deviation (n - 1) over the folds.

    ``table`` has a row for each fold (with its name as index) and a column for each metric. Missing values are
    left out of the mean; a single fold has no standard deviation.
    """
    figure, panels = _panels(title, metrics, height=1.9)
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_folds(axes, _column(table, metric), _name(metric))
        axes.set_xticks(range(len(table)), [str(fold) for fold in table.index], fontsize=9)
        axes.set_xlim(-0.6, len(table) - 0.4)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("value (zoomed axis)" if axes in panels[::2] else "")
        axes.set_xlabel("fold" if axes in _last_row(panels) else "")
    _legend(figure, panels[0].get_legend_handles_labels()[0], columns=3, title=ZOOMED)
    return figure


def _draw_reliability(top: Axes, bottom: Axes, labels: Labels, probabilities: Floats, bins: int) -> None:
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    used = counts > 0
    positives = np.bincount(place[labels == 1], minlength=bins)[used]
    predicted = np.bincount(place, weights=probabilities, minlength=bins)[used] / counts[used]
    top.plot([0, 1], [0, 1], label="perfect calibration", **REFERENCE)
    top.vlines(predicted, *_wilson(positives, counts[used]), color=BLUE, linewidth=1.6, label="95% Wilson interval")
    top.plot(predicted, positives / counts[used], color=BLUE, marker="o", linewidth=1.2, label="bin of images")
    _grid(top)
    bars = bottom.bar(np.arange(bins) / bins, counts, width=1 / bins, align="edge", color="0.7", edgecolor=BLACK)
    if bins <= 20:
        bottom.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2, rotation=90)


def _draw_folds(axes: Axes, values: Floats, name: str) -> None:
    known = values[np.isfinite(values)]
    mean = float(known.mean()) if known.size else np.nan
    spread = float(known.std(ddof=1)) if known.size > 1 else np.nan
    axes.axhspan(mean - spread, mean + spread, color="0.88", zorder=0, label="mean ± standard deviation")
    axes.axhline(mean, color=BLACK, linestyle="--", linewidth=1.2, label="mean of the folds")
    axes.plot(values, color=BLUE, marker="o", markersize=7, linestyle="none", label="one fold", clip_on=False)
    for row in np.flatnonzero(~np.isfinite(values)).tolist():
        axes.text(row, 0.05, "n/a", transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
    axes.margins(y=0.15)
    axes.set_title(f"{name}: {_number(mean, '.4f')} ± {_number(spread, '.4f')}", fontsize=10.5)
