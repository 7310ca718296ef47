from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from plot_help import LABELS, PROBABILITIES, line, save, texts
from sklearn.metrics import roc_auc_score

from cxr.config import ARCHS
from cxr.evaluation.metrics import expected_calibration_error
from cxr.figures import single
from cxr.figures import strategies as plots
from cxr.figures.style import BLUE
from cxr.strategies import STRATEGIES

NAMES = list(STRATEGIES)
coordinate = st.integers(0, 4).map(float) | st.just(float("nan"))


def legend(figure: Figure) -> Legend:
    (found,) = figure.legends
    return found


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in legend(figure).get_texts()]


def legend_looks(figure: Figure) -> dict[str, tuple[object, object]]:
    handles = zip(legend_texts(figure), legend(figure).legend_handles, strict=True)
    return {
        name: (handle.get_color(), handle.get_marker())
        for name, handle in ((text.split()[0].rstrip(":"), handle) for text, handle in handles)
        if isinstance(handle, Line2D) and name in NAMES
    }


def legend_is_outside(figure: Figure) -> bool:
    box = legend(figure).get_window_extent()
    return not any(box.overlaps(bounds) for axes in figure.axes if (bounds := axes.get_tightbbox()) is not None)


def history(epochs: int, loss: float = 0.0) -> pd.DataFrame:
    epoch = np.arange(epochs)
    falling = np.exp(-epoch / 5) + loss
    return pd.DataFrame({"epoch": epoch, "train_loss": falling, "val_loss": falling, "val_roc_auc": 1 - falling / 4})


def comparison(metric: str = "roc_auc", seeds: int = 3) -> pd.DataFrame:
    values = np.array([0.90, 0.95, 0.94, 0.97])
    return pd.DataFrame(
        {
            metric: values,
            f"{metric}_low": values - 0.02,
            f"{metric}_high": values + 0.01,
            f"{metric}_seeds": [[value + 0.001 * i for i in range(seeds)] for value in values],
            "seconds": [60.0, 100.0, 400.0, 900.0],
        },
        index=NAMES,
    )


def differences(*rows: tuple[float, float, float, float]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=["difference", "low", "high", "p_holm"])
    return table.assign(a="gradual", b="frozen")


def roc_curves(seeds: int) -> dict[str, tuple[NDArray[np.int_], list[NDArray[np.float64]]]]:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    return {
        name: (labels, [np.clip(0.4 * labels + rng.uniform(0, 0.6, 100), 0, 1) for _ in range(seeds)]) for name in NAMES
    }


def all_figures(seeds: int) -> dict[str, Figure]:
    table, matrices = comparison(seeds=seeds), {name: np.array([[9, 1], [2.5, 17.5]]) for name in NAMES}
    return {
        "curves": plots.strategy_curves({name: [history(4)] * seeds for name in NAMES}, "curves"),
        "metrics": plots.metric_intervals(table, ["roc_auc"], "metrics"),
        "roc": plots.roc_overlay(roc_curves(seeds), "roc"),
        "confusion": plots.confusion_row(matrices, ["NORMAL", "PNEUMONIA"], "confusion"),
        "cost": plots.quality_cost(table, "roc_auc", "seconds", "cost"),
        "differences": plots.paired_differences(differences((0.1, 0.0, 0.2, 0.5)), "roc_auc", 0.01, "differences"),
        "calibration": single.calibration_pair(LABELS, PROBABILITIES, PROBABILITIES, "calibration"),
        "folds": single.folds(table[["roc_auc"]], ["roc_auc"], "folds"),
    }


def test_every_strategy_has_a_distinct_style() -> None:
    assert set(plots.STYLES) == set(STRATEGIES)
    for key in ("color", "linestyle", "marker"):
        assert len({style[key] for style in plots.STYLES.values()}) == len(plots.STYLES)


@pytest.mark.parametrize("seeds", [1, 5])
def test_figures_are_wide_titled_and_keep_legends_off_the_data(seeds: int) -> None:
    for name, figure in all_figures(seeds).items():
        save(figure)
        assert figure.get_figwidth() * figure.dpi >= 863.9, name
        assert figure.get_suptitle() == name
        assert name == "confusion" or legend_is_outside(figure), name


def test_a_strategy_has_the_same_style_in_every_figure() -> None:
    figures = all_figures(2)
    looks = {name: (style["color"], style["marker"]) for name, style in plots.STYLES.items()}
    assert [legend_looks(figures[name]) for name in ("curves", "roc", "cost")] == [looks] * 3


def test_no_two_backbones_look_alike() -> None:
    looks = [plots._style(arch) for arch in ARCHS]
    assert len({(look["color"], look["marker"]) for look in looks}) == len(ARCHS)


def test_an_unknown_strategy_is_rejected() -> None:
    with pytest.raises(ValueError, match="'linear' has no style"):
        plots.strategy_curves({"linear": [history(2)]}, "curves")


def test_strategy_curves_average_the_seeds_that_reached_the_epoch() -> None:
    figure = plots.strategy_curves({"full": [history(2), history(4, loss=0.5)], "frozen": [history(7)]}, "curves")
    loss = figure.axes[0]
    mean = np.asarray(line(loss, "full").get_xydata(), dtype=float)
    np.testing.assert_allclose(mean, np.c_[range(4), history(4)["val_loss"] + [0.25, 0.25, 0.5, 0.5]])
    thin = [line for line in loss.lines if line.get_linewidth() < 1]
    assert [len(np.asarray(line.get_xdata())) for line in thin] == [2, 4, 7]
    assert legend_texts(figure) == ["full (2 seeds)", "frozen (1 seed)"]
    save(figure)


def test_strategy_curves_accept_one_epoch_missing_scores_and_no_seed() -> None:
    histories = {"full": [history(1).assign(val_roc_auc=np.nan)], "frozen": []}
    figure = plots.strategy_curves(histories, "curves")
    assert legend_texts(figure) == ["full (1 seed)", "frozen (0 seeds)"]
    save(figure)


def test_metric_intervals_draw_value_interval_and_seeds() -> None:
    figure = plots.metric_intervals(comparison(), ["roc_auc"], "metrics")
    axes = figure.axes[0]
    interval, value, seeds = axes.lines[:3]
    np.testing.assert_allclose(np.asarray(interval.get_xdata()), [0.88, 0.91])
    np.testing.assert_allclose(np.asarray(value.get_xdata()), [0.9])
    np.testing.assert_allclose(np.asarray(seeds.get_xdata()), [0.9, 0.901, 0.902])
    assert texts(axes) == ["0.9000", "0.9500", "0.9400", "0.9700"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == NAMES


def test_metric_intervals_have_zoomed_axes_labelled_as_such() -> None:
    table = comparison().join(comparison("brier").drop(columns="seconds"))
    table[["brier", "brier_low", "brier_high"]] /= 10
    table["brier_seeds"] = [[]] * 4
    figure = plots.metric_intervals(table, ["roc_auc", "brier"], "metrics")
    save(figure)
    (low, high), (brier_low, brier_high) = figure.axes[0].get_xlim(), figure.axes[1].get_xlim()
    assert 0.8 < low < 0.88
    assert 0.98 < high < 1.0
    assert 0.08 < brier_low < brier_high < 0.1
    assert [axes.get_title() for axes in figure.axes] == ["ROC-AUC (higher is better)", "Brier score (lower is better)"]
    assert all("zoomed" in axes.get_xlabel() for axes in figure.axes)


def test_metric_intervals_mark_missing_values() -> None:
    table = comparison(seeds=1)
    table.loc["partial", ["roc_auc", "roc_auc_low", "roc_auc_high"]] = np.nan
    table[["roc_auc_low", "roc_auc_high"]] = np.nan
    figure = plots.metric_intervals(table, ["roc_auc"], "metrics")
    assert texts(figure.axes[0])[1] == "n/a"
    save(figure)


@pytest.mark.parametrize("draw", [plots.metric_intervals, single.folds])
def test_panels_need_a_metric(draw: Callable[[pd.DataFrame, Sequence[str], str], Figure]) -> None:
    with pytest.raises(ValueError, match="no metric"):
        draw(comparison(), [], "none")


def test_mean_roc_of_one_seed_is_its_curve() -> None:
    x, y = plots.mean_roc(LABELS, [PROBABILITIES])
    # The negative at 0.9 is above all positives but one; then come five positives and the other negatives.
    corners = {(0.0, 0.0), (0.0, 1 / 6), (0.25, 1 / 6), (0.25, 1.0), (1.0, 1.0)}
    assert {(round(a, 6), round(b, 6)) for a, b in zip(x, y, strict=True)} == {
        (round(a, 6), round(b, 6)) for a, b in corners
    }


@given(st.lists(st.lists(st.integers(0, 5), min_size=10, max_size=10), min_size=1, max_size=4))
def test_area_under_mean_roc_is_the_mean_area(seeds: list[list[int]]) -> None:
    probabilities = [np.array(seed) / 5 for seed in seeds]
    x, y = plots.mean_roc(LABELS, probabilities)
    areas = [roc_auc_score(LABELS, seed) for seed in probabilities]
    assert np.trapezoid(y, x) == pytest.approx(np.mean(areas))
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= -1e-12).all()


def test_mean_roc_needs_both_classes_and_a_seed() -> None:
    with pytest.raises(ValueError, match="both classes"):
        plots.mean_roc(np.ones(10, int), [PROBABILITIES])
    with pytest.raises(ValueError, match="no seed"):
        plots.mean_roc(LABELS, [])


def test_roc_overlay_prints_aucs_with_their_standard_deviation_over_seeds() -> None:
    worse = PROBABILITIES[::-1]
    figure = plots.roc_overlay({"full": (LABELS, [PROBABILITIES]), "gradual": (LABELS, [PROBABILITIES, worse])}, "roc")
    areas = [roc_auc_score(LABELS, seed) for seed in (PROBABILITIES, worse)]
    mean, spread = np.mean(areas), np.std(areas, ddof=1)
    assert legend_texts(figure) == [
        f"full: AUC {areas[0]:.4f} (1 seed)",
        f"gradual: AUC {mean:.4f} ± {spread:.4f} (2 seeds)",
        "chance",
    ]
    save(figure)


@pytest.mark.parametrize(("inverted", "side"), [(0, 0.02), (2, 0.05), (6, 0.1), (30, 0.5)])
def test_roc_overlay_zooms_as_far_as_the_curves_allow(inverted: int, side: float) -> None:
    labels = np.repeat([0, 1], 100)
    probabilities = labels * 0.8 + 0.1
    probabilities[:inverted] = probabilities[100 : 100 + inverted] = 0.5
    corner = plots.roc_overlay({"full": (labels, [probabilities])}, "roc").axes[1]
    assert corner.get_xlim()[1] == pytest.approx(side)
    assert corner.get_ylim()[0] == pytest.approx(1 - side)


def test_confusion_row_prints_counts_and_row_percentages() -> None:
    matrices = {"frozen": np.array([[150, 50], [10, 1990]]), "full": np.array([[0, 0], [2.5, 7.5]])}
    figure = plots.confusion_row(matrices, ["NORMAL", "PNEUMONIA"], "matrices")
    first, second = figure.axes
    assert texts(first) == ["150\n75.0%", "50\n25.0%", "10\n0.5%", "1,990\n99.5%"]
    assert texts(second) == ["0\nn/a", "0\nn/a", "2.5\n25.0%", "7.5\n75.0%"]
    assert [axes.get_title() for axes in figure.axes] == ["frozen", "full"]
    save(figure)


def test_confusion_row_shares_one_scale() -> None:
    matrices = {"frozen": np.array([[1, 1], [1, 1]]), "full": np.array([[800, 800], [1, 3]])}
    figure = plots.confusion_row(matrices, ["a", "b"], "matrices")
    first, second = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    np.testing.assert_array_equal(first[0, 0], second[0, 0])
    save(figure)


def test_confusion_row_labels_do_not_overlap() -> None:
    matrices = {name: np.array([[1234.5, 1.5], [2.5, 3876.5]]) for name in NAMES}
    figure = plots.confusion_row(matrices, ["NORMAL", "PNEUMONIA"], "matrices")
    save(figure)
    labels = [label for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.texts)]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@given(st.lists(st.tuples(coordinate, coordinate), max_size=8))
def test_pareto_front_contains_exactly_the_undominated_points(points: list[tuple[float, float]]) -> None:
    front = plots.pareto_front(points)
    known = [i for i, point in enumerate(points) if not np.isnan(point).any()]
    for i in known:
        cost, quality = points[i]
        others = [points[j] for j in known]
        beaten = any((c <= cost and q > quality) or (c < cost and q >= quality) for c, q in others)
        assert (i in front) != beaten
    assert set(front) <= set(known)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


@given(st.lists(st.tuples(coordinate, coordinate), max_size=8))
def test_pareto_front_does_not_depend_on_order(points: list[tuple[float, float]]) -> None:
    turned = points[::-1]
    front = {points[i] for i in plots.pareto_front(points)}
    assert front == {turned[i] for i in plots.pareto_front(turned)}


def test_quality_cost_leaves_a_dominated_strategy_off_the_front() -> None:
    figure = plots.quality_cost(comparison(), "roc_auc", "seconds", "cost")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    front = line(axes, "Pareto front")
    assert front.get_label() == "Pareto front: frozen, partial, gradual"
    np.testing.assert_allclose(np.asarray(front.get_xdata())[:3], [60, 100, 900])
    np.testing.assert_allclose(np.asarray(front.get_ydata()), [0.90, 0.95, 0.97, 0.97])


def test_quality_cost_prefers_a_lower_error() -> None:
    figure = plots.quality_cost(comparison("brier"), "brier", "seconds", "cost")
    assert line(figure.axes[0], "Pareto front").get_label() == "Pareto front: frozen"
    save(figure)


def test_quality_cost_marks_missing_values() -> None:
    table = comparison()
    table.loc["frozen", "seconds"] = 0.0
    table.loc["partial", "roc_auc"] = np.nan
    table[["roc_auc_low", "roc_auc_high"]] = np.nan
    figure = plots.quality_cost(table, "roc_auc", "seconds", "cost")
    assert legend_texts(figure) == [
        "frozen: n/a",
        "partial: n/a",
        "full",
        "gradual",
        "Pareto front: full, gradual",
    ]
    save(figure)
    save(plots.quality_cost(table.iloc[:2], "roc_auc", "seconds", "nothing to draw"))


@pytest.mark.parametrize("cost", [0.07, 1.0, 3.3, 95.0, 11_177_538.0])
def test_quality_cost_shows_equal_costs_apart_with_a_labelled_tick(cost: float) -> None:
    figure = plots.quality_cost(comparison().assign(seconds=cost), "roc_auc", "seconds", "cost")
    save(figure)
    axes = figure.axes[0]
    places = [float(np.asarray(line(axes, name).get_xdata())[0]) for name in NAMES]
    assert len(set(places)) == 4
    assert places == pytest.approx([cost] * 4, rel=0.05)
    low, high = axes.get_xlim()
    assert any(low < tick < high for tick in axes.get_xticks())


def test_paired_differences_draw_intervals_and_print_p() -> None:
    table = differences((0.02, 0.01, 0.03, 0.00001), (0.001, -0.01, 0.02, 0.5), (np.nan, np.nan, np.nan, np.nan))
    figure = plots.paired_differences(table, "roc_auc", None, "differences")
    axes = figure.axes[0]
    assert texts(axes) == [
        "+0.0200 (+0.0100 to +0.0300)\nHolm's p < 0.0001",
        "+0.0010 (-0.0100 to +0.0200)\nHolm's p = 0.5000",
        "n/a\nHolm's p n/a",
    ]
    points = [line for line in axes.lines if line.get_markersize() == 8 and line.get_marker() in ("o", "x")]
    assert [point.get_markerfacecolor() for point in points[:2]] == [BLUE, "white"]
    assert [point.get_marker() for point in points] == ["o", "o", "x"]
    assert line(axes, "no difference").get_xdata() == [0, 0]
    assert not [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    save(figure)


@pytest.mark.parametrize(("metric", "side", "bounds"), [("roc_auc", "right", (-0.05, 0)), ("brier", "left", (0, 0.05))])
def test_paired_differences_shade_the_margin_on_the_worse_side(
    metric: str, side: str, bounds: tuple[float, float]
) -> None:
    figure = plots.paired_differences(differences((0.001, -0.01, 0.02, 0.5)), metric, 0.05, "differences")
    axes = figure.axes[0]
    (band,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    ends = sorted((band.get_x(), band.get_x() + band.get_width()))
    assert ends == pytest.approx(list(bounds))
    low, high = axes.get_xlim()
    assert low < bounds[0]
    assert high > bounds[1]
    assert f"({side} of 0: a is better)" in axes.get_xlabel()
    save(figure)


@pytest.mark.parametrize("margin", [0.0, -0.01, np.nan])
def test_paired_differences_reject_an_invalid_margin(margin: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        plots.paired_differences(differences((0, 0, 0, 1)), "roc_auc", margin, "differences")


def test_calibration_pair_titles_each_side_with_its_error() -> None:
    after = np.where(LABELS == 1, 0.9, 0.1)
    figure = single.calibration_pair(LABELS, PROBABILITIES, after, "calibration", bins=5)
    errors = [expected_calibration_error(LABELS, values, 5) for values in (PROBABILITIES, after)]
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        f"before calibration: ECE {errors[0]:.4f}",
        f"after calibration: ECE {errors[1]:.4f}",
    ]
    heights = [[bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)] for axes in figure.axes[2:]]
    assert heights == [[1, 2, 2, 2, 3], [4, 0, 0, 0, 6]]
    np.testing.assert_allclose(np.asarray(line(figure.axes[1], "bin").get_xydata()), [[0.1, 0], [0.9, 1]])
    save(figure)


def test_calibration_pair_accepts_one_class_and_rejects_no_images() -> None:
    save(single.calibration_pair(np.zeros(4, int), np.zeros(4), np.ones(4), "one class"))
    with pytest.raises(ValueError, match="no image"):
        single.calibration_pair(np.zeros(0, int), np.zeros(0), np.zeros(0), "empty")


def test_folds_print_mean_and_standard_deviation_and_show_each_fold() -> None:
    table = pd.DataFrame({"roc_auc": [0.9, 0.92, np.nan], "f1": [0.7, np.nan, np.nan], "ece": np.nan})
    figure = single.folds(table, ["roc_auc", "f1", "ece"], "folds")
    roc, f1, ece = figure.axes[:3]
    assert roc.get_title() == "ROC-AUC: 0.9100 ± 0.0141"
    assert f1.get_title() == "F1: 0.7000 ± n/a"
    assert ece.get_title() == "calibration error (ECE): n/a ± n/a"
    assert [len(texts(axes)) for axes in (roc, f1, ece)] == [1, 2, 3]
    np.testing.assert_array_equal(np.asarray(line(roc, "one fold").get_ydata()), table["roc_auc"])
    save(figure)


def test_figures_do_not_use_pyplot() -> None:
    single.folds(comparison()[["roc_auc"]], ["roc_auc"], "folds")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
