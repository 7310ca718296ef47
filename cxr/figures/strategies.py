"""Figures that compare strategies or backbones: tables and arrays in, a matplotlib ``Figure`` out.

Where this says strategy, it may be a backbone. A strategy has the same colour, line style and marker in every figure.
Missing values are shown as "n/a".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from sklearn import metrics as sk

from cxr.families import FAMILIES
from cxr.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    REFERENCE,
    VERMILLION,
    WIDTH,
    Floats,
    Labels,
    Style,
    _draw_matrix,
    _epoch_axis,
    _figure,
    _grid,
    _legend_below,
    _number,
    _require_both_classes,
)

PURPLE, ORANGE, SKY, PALE = "#CC79A7", "#E69F00", "#56B4E9", "#FBEFC4"
STYLES: dict[str, Style] = {
    "frozen": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "partial": {"color": VERMILLION, "linestyle": (0, (5, 1.5)), "marker": "s"},
    "full": {"color": GREEN, "linestyle": (0, (5, 1.5, 1, 1.5)), "marker": "^"},
    "gradual": {"color": PURPLE, "linestyle": (0, (1.5, 1)), "marker": "D"},
}
# A backbone has the colour of its family, and a marker and a line of its own in it.
FAMILY_COLORS = dict(
    zip(dict.fromkeys(f.kind for f in FAMILIES.values()), (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), strict=True)
)
MARKERS, LINES = "os^DvP<X>*", ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1)))
NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
    "f1": "F1",
    "pr_auc": "average precision",
    "roc_auc": "ROC-AUC",
    "parameters": "trainable parameters",
    "seconds": "training time (seconds)",
}
LOWER_IS_BETTER = frozenset({"brier", "ece", "loss", "log_loss"})
CORNERS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # possible side lengths of the zoomed part of a ROC plot
ZOOMED = "axes are zoomed to the data and may not start at 0"


def strategy_curves(histories: Mapping[str, Sequence[pd.DataFrame]], title: str) -> Figure:
    """Validation loss and ROC-AUC over epochs: a thin line per seed, a bold one for their mean.

    ``histories`` maps a strategy to one frame per seed with the columns epoch (from 0), val_loss and val_roc_auc.
    The mean at an epoch is over the seeds that reached it; strategies may differ in epochs.
    """
    figure = _figure(title, 7.6)
    panels = figure.subplots(2, 1, sharex=True)
    columns = {"val_loss": "validation loss (mean per image)", "val_roc_auc": "validation ROC-AUC"}
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        for name, seeds in histories.items():
            _draw_seeds(axes, name, seeds, column)
        axes.set_ylabel(label)
        axes.margins(y=0.06)
        _grid(axes)
    epochs = [frame["epoch"] for seeds in histories.values() for frame in seeds]
    if epochs:
        _epoch_axis(panels[1], pd.concat(epochs))
    shown = [_handle(name, f"{name} ({_seeds(len(seeds))})") for name, seeds in histories.items()]
    _legend(figure, shown, columns=len(shown), title="bold: mean over the seeds that reached the epoch; thin: one seed")
    figure.align_ylabels()
    return figure


def metric_intervals(table: pd.DataFrame, metrics: Sequence[str], title: str) -> Figure:
    """One panel per metric: for each strategy the value, its 95% interval and the values of the single seeds.

    ``table`` has a row for each strategy (its index) and, for each metric m, the columns m, m_low, m_high and
    m_seeds, a list of one value per seed. Values are between 0 and 1, printed at the right; axes are zoomed.
    """
    figure, panels = _panels(title, metrics, height=0.62 + 0.3 * len(table))
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_intervals(axes, table, metric)
        axes.set_title(_directed(metric), fontsize=10.5)
        axes.set_yticks(range(len(table)), list(table.index) if axes in panels[::2] else [""] * len(table))
        axes.set_ylim(len(table) - 0.4, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
        axes.margins(x=0.08)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel("value (zoomed axis)" if axes in _last_row(panels) else "")
    large = Line2D([], [], color=BLACK, marker="o", markersize=8, linewidth=2, label="value with its 95% interval")
    small = Line2D([], [], color=BLACK, marker="o", markersize=4, linestyle="none", alpha=0.6, label="one seed")
    _legend(figure, [large, small], columns=2, title=ZOOMED)
    return figure


def roc_overlay(curves: Mapping[str, tuple[Labels, Sequence[Floats]]], title: str) -> Figure:
    """The mean ROC curve of each strategy over its seeds, in full and zoomed on the upper left corner.

    ``curves`` maps a strategy to labels [n] (0 or 1) and one array of probabilities [n] of class 1 per seed. The
    legend gives the mean AUC and its standard deviation over seeds. Raises ValueError if a class is absent.
    """
    figure = _figure(title, 4.8)
    whole, corner = figure.subplots(1, 2)
    means = {name: mean_roc(labels, seeds) for name, (labels, seeds) in curves.items()}
    for axes in (whole, corner):
        axes.title.set_fontsize(11)
        axes.plot([0, 1], [0, 1], **REFERENCE)
        for name, (x, y) in means.items():
            axes.plot(x, y, linewidth=1.8, **{**_style(name), "marker": "none"})
        axes.set(xlabel="false positive rate (1 - specificity)", aspect="equal")
        _grid(axes)
    side = _corner_side(list(means.values()))
    whole.add_patch(Rectangle((0, 1 - side), side, side, fill=False, edgecolor=BLACK, linestyle=":", zorder=3))
    whole.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), ylabel="true positive rate (sensitivity)", title="full curve")
    corner.set(
        xlim=(-0.02 * side, side), ylim=(1 - side, 1 + 0.02 * side), title=f"upper left corner (dotted), {side:g} wide"
    )
    for name, (x, y) in means.items():
        _mark_along(corner, name, x, y, side)
    shown = [_handle(name, f"{name}: AUC {_auc(*curve)}") for name, curve in curves.items()]
    _legend(figure, [*shown, Line2D([], [], label="chance", **REFERENCE)], columns=2, title="mean over seeds")
    return figure


def mean_roc(labels: Labels, seeds: Sequence[Floats]) -> tuple[Floats, Floats]:
    """False and true positive rates [m] of the mean curve: true positive rates averaged at each false positive rate.

    Vertical averaging, after Fawcett, An Introduction to ROC Analysis, 2006; exact, as it keeps every step
    of every seed, so that its AUC is the mean of the AUCs of the seeds. ``seeds`` holds probabilities [n] of class 1.
    """
    _require_both_classes(labels)
    if len(seeds) == 0:
        raise ValueError("no seed to average")
    curves = [sk.roc_curve(labels, probabilities)[:2] for probabilities in seeds]
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    # At a vertical step, the two ends are the limits from the left and from the right.
    left = np.mean([np.interp(-grid, -x[::-1], y[::-1]) for x, y in curves], axis=0)
    right = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
    return np.repeat(grid, 2), np.stack([left, right], axis=1).ravel()


def confusion_row(matrices: Mapping[str, NDArray[Any]], class_names: Sequence[str], title: str) -> Figure:
    """The strategies' confusion matrices side by side: number of images, and percent of the true class (row).

    ``matrices`` maps a strategy to counts [2, 2], integer or a mean over seeds. All share one colour scale from
    0 to 100 percent; a row without images has no percentages and shows "n/a".
    """
    width = max(WIDTH, 1.8 * len(matrices))
    figure = _figure(title, 1.05 + min(width / len(matrices) - 0.25, 3.0), width)
    row = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for axes, (name, counts) in zip(row, matrices.items(), strict=True):
        totals = counts.sum(axis=1, keepdims=True)
        rates = np.where(totals > 0, 100.0 * counts / np.maximum(totals, 1e-12), np.nan)
        cells = zip(counts.flat, rates.flat, strict=True)
        _draw_matrix(axes, rates, [f"{_count(n)}\n{_number(rate, '.1f', '%')}" for n, rate in cells], 100)
        for text in axes.texts:
            text.set_fontsize(11)
        axes.set_title(name, fontsize=11)
        axes.set_xticks(range(len(class_names)), class_names, fontsize=8.5)
        axes.set_yticks(range(len(class_names)), class_names, rotation=90, va="center", fontsize=8.5)
        axes.tick_params(length=0)
    row[0].set_ylabel("true class")
    figure.supxlabel(
        "predicted class (colour: percent of the true class, the same scale from 0 to 100 in all)", fontsize=10
    )
    return figure


def quality_cost(table: pd.DataFrame, quality: str, cost: str, title: str) -> Figure:
    """Quality with its 95% interval against cost (log axis), with the Pareto front and the names of its members.

    ``table`` has a row for each strategy (its index) and the columns ``quality``, ``quality``_low, ``quality``_high
    and ``cost``, in seconds or parameters; equal costs are drawn side by side. A strategy without a quality or a
    positive cost is "n/a" in the legend. The front uses the point values only, not their intervals.
    """
    figure = _figure(title, 5.2)
    axes = figure.subplots()
    costs = np.where(_column(table, cost) > 0, _column(table, cost), np.nan)
    _log_cost_axis(axes, costs[np.isfinite(costs)])
    low, high = axes.get_xlim()
    places = _side_by_side(costs, span=high / low)
    bounds = [_column(table, quality + end) for end in ("", "_low", "_high")]
    points = zip(table.index, places, *bounds, strict=True)
    shown = [_draw_quality(axes, *point) for point in points]
    sign = -1 if quality in LOWER_IS_BETTER else 1
    front = pareto_front(list(zip(costs, sign * bounds[0], strict=True)))
    line = _draw_front(axes, costs[front], bounds[0][front], list(table.index[front]))
    axes.set(xlabel=f"{_name(cost)}, log axis", ylabel=f"{_directed(quality)}, zoomed axis")
    axes.ticklabel_format(axis="y", useOffset=False)
    _legend(figure, [*shown, line], columns=3, title="bars: 95% intervals; front: no other is both better and cheaper")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the (cost, quality) points that no other dominates, in order of cost.

    One point dominates another if it costs no more, is no worse, and is better in one of the two. Equal points
    do not dominate each other; a point with a NaN is never on the front.
    """
    known = [i for i, point in enumerate(points) if not np.isnan(point).any()]
    front = [i for i in known if not any(_dominates(points[j], points[i]) for j in known)]
    return sorted(front, key=lambda i: points[i][0])


def paired_differences(table: pd.DataFrame, metric: str, margin: float | None, title: str) -> Figure:
    """Forest plot of the differences a - b in ``metric`` between pairs of strategies, with their 95% intervals.

    ``table`` has a row for each pair and the columns a, b, difference, low, high and p_holm (Holm's adjusted p).
    ``margin``, in units of the metric and above 0, shades differences where a is worse than b by less than the margin:
    a is non-inferior if the whole interval lies on the better side of the far edge of the shading.
    """
    if margin is not None and not margin > 0:
        raise ValueError(f"the margin must be above 0, not {margin}")
    figure = _figure(title, 1.9 + 0.5 * len(table))
    axes = figure.subplots()
    worse = 1 if metric in LOWER_IS_BETTER else -1
    axes.axvline(0, label="no difference", **REFERENCE)
    if margin is not None:
        axes.axvspan(
            0, worse * margin, color=PALE, zorder=0, label=f"non-inferiority margin: a worse by less than {margin:g}"
        )
    rows = table[["difference", "low", "high", "p_holm"]].to_numpy(dtype=float)
    for row, (difference, low, high, p) in enumerate(rows):
        _draw_difference(axes, row, (difference, low, high), p)
    pairs = [f"{a} - {b}" for a, b in zip(table["a"], table["b"], strict=True)]
    axes.set_yticks(range(len(table)), pairs)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlabel(f"difference in {_name(metric)}, a - b ({'left' if worse > 0 else 'right'} of 0: a is better)")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    _grid(axes)
    for face, text in (("white", "interval includes 0"), (BLUE, "interval excludes 0")):
        axes.plot([], [], label=text, markerfacecolor=face, markersize=7, color=BLUE, marker="o", linewidth=2)
    _legend_below(figure, columns=3 if margin is None else 2)
    return figure


def _style(name: str) -> Style:
    if name in FAMILIES:
        return _backbone_style(name)
    if name not in STYLES:
        raise ValueError(f"strategy {name!r} has no style; known strategies: {', '.join(STYLES)}")
    return STYLES[name]


def _backbone_style(arch: str) -> Style:
    family = FAMILIES[arch]
    place = [each for each, other in FAMILIES.items() if other is family].index(arch)
    marker, line = MARKERS[place % len(MARKERS)], LINES[place % len(LINES)]
    return {"color": FAMILY_COLORS[family.kind], "linestyle": line, "marker": marker}


def _name(column: str) -> str:
    return NAMES.get(column, column.replace("_", " "))


def _directed(metric: str) -> str:
    return f"{_name(metric)} ({'lower' if metric in LOWER_IS_BETTER else 'higher'} is better)"


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _count(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _column(table: pd.DataFrame, name: str) -> Floats:
    return table[name].to_numpy(dtype=float)


def _handle(name: str, label: str) -> Line2D:
    return Line2D([], [], label=label, linewidth=2, markersize=6, **_style(name))


def _legend(figure: Figure, handles: Sequence[Any], columns: int, title: str | None = None) -> None:
    options: dict[str, Any] = {"loc": "outside lower center", "fontsize": 9.5, "title_fontsize": 9.5}
    figure.legend(handles=handles, ncols=max(columns, 1), title=title, frameon=False, handlelength=3, **options)


def _panels(title: str, metrics: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Two panels per row, or one for a single metric; ``height`` is that of a row, in inches."""
    if not metrics:
        raise ValueError("no metric to plot")
    columns = min(len(metrics), 2)
    rows = -(-len(metrics) // columns)
    figure = _figure(title, 1.3 + rows * height)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    for axes in panels[: len(metrics)]:
        _grid(axes)
    return figure, panels[: len(metrics)]


def _last_row(panels: Sequence[Axes]) -> Sequence[Axes]:
    return panels[(len(panels) - 1) // 2 * 2 :]


def _draw_seeds(axes: Axes, name: str, seeds: Sequence[pd.DataFrame], column: str) -> None:
    style = _style(name)
    if not seeds:
        return
    for frame in seeds:
        axes.plot(frame["epoch"], frame[column], color=style["color"], linewidth=0.8, alpha=0.4)
    mean = pd.concat(seeds).groupby("epoch")[column].mean()
    every = [*range(0, len(mean) - 1, max(len(mean) // 10, 1)), len(mean) - 1]
    axes.plot(mean.index, mean, label=name, linewidth=2.4, markersize=5.5, markevery=every, zorder=3, **style)


def _draw_intervals(axes: Axes, table: pd.DataFrame, metric: str) -> None:
    bounds = [_column(table, metric + end) for end in ("", "_low", "_high")]
    rows = zip(table.index, *bounds, table[f"{metric}_seeds"], strict=True)
    for row, (name, value, low, high, seeds) in enumerate(rows):
        color, marker = _style(name)["color"], _style(name)["marker"]
        axes.plot([low, high], [row - 0.12] * 2, color=color, linewidth=2.2)
        axes.plot([value], [row - 0.12], color=color, marker=marker, markersize=7, markeredgecolor=BLACK)
        axes.plot(seeds, [row + 0.25] * len(seeds), color=color, marker=marker, markersize=4, linestyle="", alpha=0.6)
        axes.text(1.02, row, _number(value, ".4f"), transform=axes.get_yaxis_transform(), va="center", fontsize=9.5)


def _auc(labels: Labels, seeds: Sequence[Floats]) -> str:
    areas = [sk.roc_auc_score(labels, probabilities) for probabilities in seeds]
    spread = f" ± {np.std(areas, ddof=1):.4f}" if len(areas) > 1 else ""
    return f"{np.mean(areas):.4f}{spread} ({_seeds(len(areas))})"


def _corner_side(means: Sequence[tuple[Floats, Floats]]) -> float:
    """The smallest side of `CORNERS` that shows, with some margin, where each curve comes closest to the corner."""
    worst = max((float(np.maximum(x, 1 - y).min()) for x, y in means), default=0.0)
    return next((side for side in CORNERS if side >= 1.6 * worst), CORNERS[-1])


def _mark_along(axes: Axes, name: str, x: Floats, y: Floats, side: float) -> None:
    """Markers of the strategy at a few points on the curve in the corner, at different points for each strategy."""
    known = list(FAMILIES if name in FAMILIES else STYLES)
    shift = known.index(name) / len(known)
    # x + y increases along the curve, so equal steps in it cover both the steep and the flat part.
    along = side * np.linspace(-1, 1, 6)[:-1] + side * 0.4 * shift
    at_x, at_y = np.interp(along, x + y - 1, x), np.interp(along, x + y - 1, y)
    style = _style(name)
    axes.plot(at_x, at_y, color=style["color"], marker=style["marker"], linestyle="none", markersize=6)


def _draw_quality(axes: Axes, name: str, cost: float, value: float, low: float, high: float) -> Line2D:
    style = {**_style(name), "linestyle": "none"}
    missing = "" if np.isfinite([cost, value]).all() else ": n/a"
    axes.plot([cost, cost], [low, high], color=style["color"], linewidth=2, zorder=2)
    label = f"{name}{missing}"
    return axes.plot([cost], [value], label=label, markersize=9, markeredgecolor=BLACK, zorder=3, **style)[0]


def _draw_front(axes: Axes, costs: Floats, values: Floats, names: Sequence[str]) -> Line2D:
    style: Style = {"color": BLACK, "linewidth": 1.4, "linestyle": "--", "drawstyle": "steps-post", "zorder": 1}
    # Extended to the right: at any higher cost the last member remains the best.
    x, y = [*costs, axes.get_xlim()[1]], [*values, values[-1] if len(values) else np.nan]
    return axes.plot(x, y, label=f"Pareto front: {', '.join(names) or 'n/a'}", **style)[0]


def _side_by_side(costs: Floats, span: float) -> Floats:
    """Positions on a log axis of ``span`` (high end divided by low end), with equal costs slightly separated."""
    order = np.array([np.sum(costs[:i] == cost) for i, cost in enumerate(costs)])
    ties = np.array([np.sum(costs == cost) for cost in costs])
    return costs * span ** (0.012 * (order - (ties - 1) / 2))


def _log_cost_axis(axes: Axes, costs: Floats) -> None:
    axes.set_xscale("log")
    # Wide enough to include 1, 2 or 5 times a power of ten even if all costs are equal.
    if costs.size:
        axes.set_xlim(costs.min() / 1.7, costs.max() * 1.7)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    _grid(axes)


def _short(value: float) -> str:
    return f"{value / 1e6:,g} million" if value >= 1e6 else f"{value:,g}"


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def _draw_difference(axes: Axes, row: int, interval: tuple[float, float, float], p: float) -> None:
    difference, low, high = interval
    known = np.isfinite([low, high]).all()
    face, marker = BLUE if low > 0 or high < 0 else "white", "o" if known else "x"
    axes.plot([low, high], [row, row], color=BLUE, linewidth=2.2, marker="|", markersize=8)
    axes.plot([difference], [row], color=BLUE, marker=marker, markersize=8, markerfacecolor=face, zorder=3)
    bounds = f" ({low:+.4f} to {high:+.4f})" if known else ""
    text = f"{_number(difference, '+.4f')}{bounds}\nHolm's p {_p_value(p)}"
    axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5)


def _p_value(p: float) -> str:
    if not np.isfinite(p):
        return "n/a"
    return "< 0.0001" if p < 1e-4 else f"= {p:.4f}"
