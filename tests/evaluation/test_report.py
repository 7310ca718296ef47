from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.special import softmax

from cxr.evaluation.calibration import Calibration, CalibrationMethod
from cxr.evaluation.metrics import DECISION_METRICS, METRICS, point_metrics
from cxr.evaluation.predictions import predictions_table
from cxr.evaluation.report import CALIBRATED, MAIN, Report, at_first_sight, evaluate, format_interval, origin_of
from cxr.threshold_rule import ThresholdRule


def images(n: int) -> pd.DataFrame:
    """Rows of a manifest with an index that does not start at 0."""
    return pd.DataFrame(
        {
            "path": [f"{i}.jpeg" for i in range(n)],
            "digest": [f"{i:064x}" for i in range(n)],
            "group": [f"p{i // 2}" for i in range(n)],
            "subtype": ["normal" if i % 2 else ("virus" if i % 4 else "bacteria") for i in range(n)],
            "label": [1 - i % 2 for i in range(n)],
            "split": "test",
        },
        index=range(100, 100 + n),
    )


def report(resamples: int = 50) -> Report:
    logits = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    table = predictions_table(images(20), logits, 0.4, Calibration(CalibrationMethod.PLATT, 0.8, 0.1))
    return evaluate(table, "test", 0.4, resamples, 0.7)


@given(arrays(np.float32, (4, 2), elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-20, 20, width=32)))
@settings(max_examples=100)
def test_probability_is_the_softmax_of_any_finite_logits(logits: NDArray[np.float32]) -> None:
    table = predictions_table(images(4), logits)
    np.testing.assert_allclose(table["probability"], softmax(logits.astype(np.float64), axis=1)[:, 1], rtol=1e-12)


def test_the_table_keeps_the_images_in_order_with_their_logits() -> None:
    logits = np.arange(8, dtype=np.float32).reshape(4, 2)
    table = predictions_table(images(4), logits)
    assert table[["logit_normal", "logit_pneumonia"]].to_numpy().tolist() == logits.tolist()
    assert list(table["path"]) == ["0.jpeg", "1.jpeg", "2.jpeg", "3.jpeg"]
    assert list(table.index) == [0, 1, 2, 3]


def test_a_tie_is_decided_positive_at_one_half() -> None:
    table = predictions_table(images(2), np.array([[3, 3], [3, 2.999]], np.float32), 0.5)
    assert list(table["decision"]) == [1, 0]


def test_logits_of_a_different_length_are_rejected() -> None:
    with pytest.raises(ValueError, match="length"):
        predictions_table(images(4), np.zeros((3, 2), np.float32))


def test_every_metric_can_be_recomputed_from_the_table_as_csv() -> None:
    first = report()
    text = io.StringIO(first.table.to_csv(index=False))
    again = evaluate(pd.read_csv(text), "test", 0.4, 50, 0.7)
    assert again.metrics() == pytest.approx(first.metrics(), abs=1e-12)


def test_a_report_has_scikit_learns_values_at_both_thresholds_and_before_calibration() -> None:
    got = report()
    assert got.values == point_metrics(got.labels, got.probabilities, 0.5)
    chosen, before = point_metrics(got.labels, got.probabilities, 0.4), point_metrics(got.labels, got.uncalibrated)
    assert got.chosen_values == {name: chosen[name] for name in DECISION_METRICS}
    assert got.before == {name: before[name] for name in ("brier", "log_loss", "ece")}
    assert got.before != {name: got.values[name] for name in got.before}
    assert got.counts().sum() == got.counts(0.4).sum() == 20
    assert not np.array_equal(got.counts(), got.counts(0.4))
    assert list(got.table["decision"]) == (got.probabilities >= 0.4).astype(int).tolist()


def test_metric_names_include_split_bounds_and_subtypes() -> None:
    names = set(report().metrics())
    metrics = {*METRICS, *(f"chosen_{name}" for name in DECISION_METRICS)}
    bounds = {f"test_{name}_{end}" for name in metrics for end in ("low", "high")}
    others = {"recall_virus", "recall_bacteria", *(f"uncalibrated_{name}" for name in CALIBRATED)}
    prior = {"implied", "own", "estimated", *(f"corrected_{name}" for name in ("accuracy", *CALIBRATED))}
    others |= {f"prior_{name}" for name in prior}
    assert names == {f"test_{name}" for name in metrics | others} | bounds


def test_without_resamples_no_bound_is_logged() -> None:
    values = report(0).metrics()
    assert not any(name.endswith(("_low", "_high")) for name in values)
    assert np.isfinite(list(values.values())).all()


def test_the_text_shows_each_metric_with_its_interval() -> None:
    got = report()
    assert "20 images of 10 groups" in got.text()
    assert "threshold 0.4, stored with the model" in got.text()
    for name in METRICS:
        assert f"{name:25} {format_interval(got.interval(name))}" in got.text()
    assert f"accuracy (chosen)         {format_interval(got.chosen_interval('accuracy'))}" in got.text()
    assert "prevalence of PNEUMONIA: 0.700 assumed by the probabilities, 0.500 in these images" in got.text()


def test_a_report_describes_the_origin_of_its_threshold() -> None:
    assert origin_of(ThresholdRule.parse("youden"), "test") == "chosen by youden on validation"
    assert origin_of(ThresholdRule.parse("cost 5:1"), "val") == "chosen by cost 5:1 on these images"
    assert origin_of(ThresholdRule.parse("0.3"), "test") == "fixed"


def test_a_missing_interval_is_not_shown() -> None:
    assert format_interval((0.87, 0.8421, 0.8958)) == "0.8700 [0.8421, 0.8958]"
    assert format_interval((0.87, float("nan"), float("nan"))) == "0.8700"


def test_the_headline_is_the_metrics_and_the_intervals_that_models_are_compared_by() -> None:
    one = report()
    headline, every = one.headline(), one.metrics()
    assert headline.items() <= every.items()
    assert {f"test_{name}" for name in METRICS} <= headline.keys()
    ends = {name for name in headline if name.endswith(("_low", "_high"))}
    assert ends == {f"test_{name}{end}" for name in MAIN for end in ("_low", "_high")}
    assert not any("prior" in name or "uncalibrated" in name for name in headline)
    assert {f"test_chosen_{name}" for name in MAIN[1:]} <= headline.keys()


def test_at_first_sight_leaves_only_details_out() -> None:
    one = report()
    others = {"total_seconds": 3.0, "stressed_val_loss": 0.5, "stressed_val_loss_flat": 0.6}
    shown = at_first_sight(one.metrics() | others, [one])
    assert shown == one.headline() | {"total_seconds": 3.0, "stressed_val_loss": 0.5}
