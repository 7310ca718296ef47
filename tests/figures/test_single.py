from __future__ import annotations

import io
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from plot_help import LABELS, PROBABILITIES, line, save, texts

from cxr.figures import single as plots
from cxr.figures.style import save_png

CURVES = [plots.roc_curve, plots.pr_curve]
Curve = Callable[..., Figure]


def history(*phases: tuple[str, int], lr: float = 1e-3) -> pd.DataFrame:
    names = [name for name, epochs in phases for _ in range(epochs)]
    epoch = np.arange(len(names))
    falling = np.exp(-epoch / 5)
    return pd.DataFrame(
        {
            "epoch": epoch,
            "phase": names,
            "train_loss": falling,
            "val_loss": falling + 0.1,
            "train_accuracy": 1 - falling / 2,
            "val_accuracy": 1 - falling / 2,
            "val_roc_auc": 1 - falling / 4,
            "lr": lr,
        }
    )


@pytest.mark.parametrize("phases", [[("full", 1)], [("full", 10)], [("head", 5), ("last block", 10), ("all", 15)]])
def test_learning_curves_draw_every_epoch_and_the_best(phases: list[tuple[str, int]]) -> None:
    frame = history(*phases)
    best = len(frame) - 1
    figure = plots.learning_curves(frame, best, "curves")
    loss = figure.axes[0]
    np.testing.assert_array_equal(line(loss, "validation").get_ydata(), frame["val_loss"])
    marked = line(loss, f"epoch {best}: lowest")
    assert marked.get_xydata() == pytest.approx(np.array([[best, frame["val_loss"].iloc[best]]]))
    save(figure)


def test_learning_curves_name_phases_in_order_only_when_several() -> None:
    several = plots.learning_curves(history(("head", 1), ("last block", 1), ("head", 10)), 11, "curves")
    assert texts(several.axes[0]) == ["head", "last block", "head"]
    save(several)
    assert texts(plots.learning_curves(history(("full", 10)), 9, "curves").axes[0]) == []


def test_phase_names_do_not_overlap() -> None:
    figure = plots.learning_curves(history(("head only", 1), ("layer4 and head", 1), ("all", 10)), 11, "")
    save(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("lr", [3e-4, 0.0])
def test_learning_curves_accept_a_constant_rate(lr: float) -> None:
    figure = plots.learning_curves(history(("full", 3), lr=lr), 2, "curves")
    low, high = figure.axes[2].get_ylim()
    assert low < lr < high
    save(figure)


def test_learning_curves_reject_a_best_epoch_outside_the_history() -> None:
    with pytest.raises(ValueError, match="best epoch 3"):
        plots.learning_curves(history(("full", 3)), 3, "curves")


def test_confusion_matrix_prints_counts_and_row_rates() -> None:
    counts = np.array([[150, 50], [10, 1990]])
    figure = plots.confusion_matrix(counts, ["NORMAL", "PNEUMONIA"], "matrix")
    assert texts(figure.axes[0]) == ["150", "50", "10", "1,990"]
    assert texts(figure.axes[1]) == ["75.0%", "25.0%", "0.5%", "99.5%"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["NORMAL", "PNEUMONIA"]
    assert [text.get_color() for text in figure.axes[1].texts] == ["white", "black", "black", "white"]
    save(figure)


def test_confusion_matrix_has_no_rates_for_an_absent_class() -> None:
    figure = plots.confusion_matrix(np.array([[0, 0], [1, 3]]), ["NORMAL", "PNEUMONIA"], "matrix")
    assert texts(figure.axes[1]) == ["n/a", "n/a", "25.0%", "75.0%"]
    save(figure)


def test_roc_curve_marks_rates_at_the_threshold() -> None:
    figure = plots.roc_curve(LABELS, PROBABILITIES, (0.75, 0.5, 0.9), "roc")
    point = line(figure.axes[0], "threshold 0.50")
    assert point.get_xydata() == pytest.approx(np.array([[1 / 4, 5 / 6]]))
    assert line(figure.axes[0], "AUC").get_label() == "AUC 0.750 (95% CI 0.500 to 0.900)"
    save(figure)


def test_pr_curve_marks_precision_at_the_threshold() -> None:
    figure = plots.pr_curve(LABELS, PROBABILITIES, (0.8, 0.6, 0.9), "pr", threshold=0.65)
    point = line(figure.axes[0], "threshold 0.65")
    assert point.get_xydata() == pytest.approx(np.array([[3 / 6, 3 / 4]]))
    assert np.unique(line(figure.axes[0], "prevalence").get_ydata()) == pytest.approx([0.6])
    save(figure)


def test_roc_curve_computes_the_auc_if_none_is_given() -> None:
    # Of the 24 pairs, the five with the negative at 0.9 above a positive are in the wrong order.
    figure = plots.roc_curve(LABELS, PROBABILITIES, None, "roc")
    assert line(figure.axes[0], "AUC").get_label() == f"AUC {19 / 24:.3f}"


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("area", "constant"), [(None, 0.3), ((0.5, np.nan, np.nan), 1.0)])
def test_curves_draw_equal_probabilities(
    curve: Curve, area: tuple[float, float, float] | None, constant: float
) -> None:
    figure = curve(LABELS, np.full(10, constant), area, "constant")
    assert not any("CI" in str(line.get_label()) for line in figure.axes[0].lines)
    save(figure)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("labels", [np.zeros(10, int), np.ones(10, int)])
def test_curves_reject_labels_of_one_class(curve: Curve, labels: NDArray[np.int_]) -> None:
    with pytest.raises(ValueError, match="both classes"):
        curve(labels, PROBABILITIES, None, "one class")


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [(PROBABILITIES, [1, 2, 2, 2, 3]), (np.zeros(10), [10, 0, 0, 0, 0]), (np.ones(10), [0, 0, 0, 0, 10])],
)
def test_reliability_bins_count_every_image(probabilities: NDArray[np.float64], expected: list[int]) -> None:
    figure = plots.reliability_diagram(LABELS, probabilities, 0.1, "reliability", bins=5)
    bars = [patch for patch in figure.axes[1].patches if isinstance(patch, Rectangle)]
    assert [bar.get_height() for bar in bars] == expected
    save(figure)


def test_reliability_points_are_bin_means_with_wilson_intervals() -> None:
    figure = plots.reliability_diagram(LABELS, PROBABILITIES, np.nan, "reliability", bins=2)
    top = figure.axes[0]
    drawn = line(top, "bins of images").get_xydata()
    assert drawn == pytest.approx(np.array([[0.25, 1 / 4], [0.75, 5 / 6]]))
    # The 95% score interval of 1 in 4, as R's prop.test(1, 4, correct = FALSE) gives it.
    (segment, _) = top.collections[0].get_segments()  # type: ignore[attr-defined]
    assert segment[:, 1] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    save(figure)


def test_metric_bars_print_values_and_omit_missing_intervals() -> None:
    values = {"accuracy": (0.9, 0.85, 0.95), "F1": (0.8, np.nan, np.nan), "kappa": (np.nan, np.nan, np.nan)}
    figure = plots.metric_bars(values, "metrics")
    assert texts(figure.axes[0]) == ["0.900 (0.850 to 0.950)", "0.800", "n/a"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [0.85, 0.95])
    save(figure)


@pytest.mark.parametrize(("count", "columns"), [(1, 6), (5, 2), (7, 6)])
def test_image_grid_shows_every_image_with_its_caption(count: int, columns: int) -> None:
    images = np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 4)
    figure = plots.image_grid(images, [f"view {i}" for i in range(count)], "grid", columns)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == [f"view {i}" for i in range(count)]
    np.testing.assert_array_equal([axes.images[0].get_array() for axes in shown], images)
    save(figure)


def test_image_grid_rejects_missing_captions() -> None:
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        plots.image_grid(np.zeros((2, 3, 3), np.uint8), ["one"], "grid")


@pytest.mark.parametrize(("count", "columns"), [(1, 4), (2, 2), (6, 4), (12, 4)])
def test_explanation_panel_overlays_each_heat_map_on_its_image(count: int, columns: int) -> None:
    images = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4)
    heats = np.linspace(0, 1, count * 16).reshape(count, 4, 4)
    figure = plots.explanation_panel(images, heats, [f"borderline {i}" for i in range(count)], "panel", columns)
    *shown, bar = [axes for axes in figure.axes if axes.get_title() or axes.get_xlabel()]
    assert [axes.get_title() for axes in shown] == [f"borderline {i}" for i in range(count)]
    for layer, values in enumerate((images, heats)):
        np.testing.assert_array_equal([axes.images[layer].get_array() for axes in shown], values)
    assert all(axes.images[1].get_clim() == (0, 1) for axes in shown)
    assert "maximum of each image" in bar.get_xlabel().replace("\n", " ")
    save(figure)
    assert figure.bbox.width <= 864
    assert min(axes.bbox.width for axes in shown) > 170


def test_heat_is_invisible_at_zero_and_never_hides_the_image() -> None:
    opacity = plots.HEAT(np.linspace(0, 1, 256))[:, 3]
    assert opacity[0] == 0
    assert (np.diff(opacity) > 0).all()
    assert opacity[-1] < 0.8


def test_explanation_panel_rejects_missing_heat_maps() -> None:
    with pytest.raises(ValueError, match="2 images and 1 heat maps"):
        plots.explanation_panel(np.zeros((2, 3, 3), np.uint8), np.zeros((1, 3, 3)), ["a", "b"], "panel")


def test_plots_do_not_use_pyplot() -> None:
    plots.metric_bars({"accuracy": (0.9, 0.8, 1.0)}, "metrics")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize("bounded", [True, False])
def test_selective_accuracy_shows_the_curve_its_band_and_what_the_model_keeps(bounded: bool) -> None:
    coverages = np.linspace(0.05, 1, 20)
    accuracy = 0.99 - 0.08 * coverages
    margin = np.full(20, 0.02 if bounded else np.nan)
    curve = {"accuracy": accuracy, "low": accuracy - margin, "high": accuracy + margin}
    figure = plots.selective_accuracy(coverages, curve, 0.104, "Test: partial, seed 0")
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), accuracy)
    assert len(axes.collections) == bounded
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "model abstains from 10.4%" in labels
    assert ("95% interval" in labels) == bounded


def test_saved_pictures_have_the_pixels_that_matplotlib_saves() -> None:
    labels = np.tile([0, 1], 30)
    figures = [plots.roc_curve(labels, np.linspace(0, 1, 60), (0.5, 0.4, 0.6), "A title") for _ in range(2)]
    files = io.BytesIO(), io.BytesIO()
    save_png(figures[0], files[0])
    figures[1].savefig(files[1])
    ours, theirs = (np.asarray(Image.open(file).convert("RGB")) for file in files)
    np.testing.assert_array_equal(ours, theirs)


LONG = "Reliability of the probabilities on the held-out images of another hospital, threshold 0.429 (624 images)"


def fixed_figures(title: str) -> dict[str, Figure]:
    """Those whose margins are not measured."""
    grid, captions = np.zeros((7, 32, 32), np.uint8), ["confident wrong: PNEUMONIA, p = 0.998"] * 7
    counts, shares = np.array([[25_000, 58], [18, 372]]), np.linspace(0.05, 1, 20)
    curve = dict.fromkeys(("accuracy", "low", "high"), shares * 0.001 + 0.995)
    many = np.repeat(LABELS, 3000), np.repeat(PROBABILITIES, 3000)
    interval = (0.945, 0.928, 0.962)
    return {
        "confusion matrix": plots.confusion_matrix(counts, ["NORMAL", "PNEUMONIA"], title),
        "long names": plots.confusion_matrix(np.eye(3, dtype=int), ["normal", "bacterial pneumonia", "other"], title),
        "roc": plots.roc_curve(LABELS, PROBABILITIES, interval, title),
        "pr": plots.pr_curve(LABELS, PROBABILITIES, interval, title),
        "selective": plots.selective_accuracy(shares, curve, 0.176, title),
        "calibration": plots.calibration_pair(*many, many[1] * 0.9, title, event="the decision being right"),
        "views": plots.image_grid(grid, captions, title),
        "grad-cam": plots.explanation_panel(grid, np.ones((7, 32, 32)), captions, title),
    }


@pytest.mark.parametrize("title", ["ROC curve", LONG])
def test_nothing_overlaps_or_is_cut_off_where_margins_are_fixed(title: str) -> None:
    for name, figure in fixed_figures(title).items():
        save(figure)
        boxes = [box for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
        boxes += [text.get_window_extent() for text in figure.texts]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes), name
        assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes), name
        shrunk = [box.padded(-1) for box in boxes]
        assert not any(a.overlaps(b) for i, a in enumerate(shrunk) for b in shrunk[:i]), name
