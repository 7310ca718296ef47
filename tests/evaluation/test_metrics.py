from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cxr.evaluation.metrics import (
    DECISION_METRICS,
    METRICS,
    Floats,
    Ints,
    classification_report,
    confusion,
    expected_calibration_error,
    group_weights,
    intervals,
    point_metrics,
    recall_by_subtype,
    weighted_metrics,
)

Case = tuple[Ints, Floats, float]
AT_HALF = partial(weighted_metrics, threshold=0.5)
LABELS = np.array([0, 0, 0, 1, 1, 1])
PROBABILITIES = np.array([0.1, 0.4, 0.6, 0.4, 0.7, 0.9])
# Coarse values tie often; fine ones hardly ever do.
PROBABILITY = st.integers(0, 4).map(lambda k: k / 4) | st.floats(0, 1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Labels with both classes, probabilities with and without ties, a threshold."""
    n = draw(st.integers(2, 30))
    labels = draw(arrays(np.int64, n, elements=st.integers(0, 1)).filter(lambda y: 0 < y.sum() < len(y)))
    return labels, draw(arrays(np.float64, n, elements=PROBABILITY)), draw(PROBABILITY)


@given(cases())
@settings(max_examples=60)
def test_unit_weights_give_scikit_learns_values(case: Case) -> None:
    labels, probabilities, threshold = case
    weighted = weighted_metrics(labels, probabilities, np.ones((2, len(labels))), threshold)
    expected = point_metrics(labels, probabilities, threshold)
    assert weighted.keys() == expected.keys() == set(METRICS)
    for name, values in weighted.items():
        assert values == pytest.approx(expected[name], abs=1e-12), name


@given(cases(), st.data())
@settings(max_examples=60)
def test_an_integer_weight_counts_as_that_many_images(case: Case, data: st.DataObject) -> None:
    labels, probabilities, threshold = case
    weights = data.draw(arrays(np.int64, (2, len(labels)), elements=st.integers(0, 3)))
    weights[:, [labels.argmin(), labels.argmax()]] += 1  # both classes are there
    weighted = weighted_metrics(labels, probabilities, weights.astype(np.float64), threshold)
    for row, times in enumerate(weights):
        expected = point_metrics(labels.repeat(times), probabilities.repeat(times), threshold)
        for name, value in expected.items():
            assert weighted[name][row] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(
    ("absent", "undefined"),
    [
        (1, {"recall", "balanced_accuracy", "roc_auc", "pr_auc"}),
        (0, {"specificity", "balanced_accuracy", "roc_auc"}),
    ],
)
def test_a_weighting_without_a_class_leaves_its_metrics_undefined(absent: int, undefined: set[str]) -> None:
    weights = (absent != LABELS).astype(np.float64)[None]
    weighted = weighted_metrics(LABELS, PROBABILITIES, weights, 0.5)
    assert {name for name, values in weighted.items() if np.isnan(values).any()} == undefined


def test_point_metrics_of_a_known_case() -> None:
    values = point_metrics(LABELS, PROBABILITIES, 0.5)
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["recall"] == values["specificity"] == values["precision"] == pytest.approx(2 / 3)
    assert values["roc_auc"] == pytest.approx(7.5 / 9)
    assert values["brier"] == pytest.approx((0.01 + 0.16 + 0.36 + 0.36 + 0.09 + 0.01) / 6)


def test_a_probability_at_the_threshold_is_positive() -> None:
    assert point_metrics(LABELS, PROBABILITIES, 0.4)["recall"] == 1
    assert confusion(LABELS, PROBABILITIES, 0.4).tolist() == [[1, 2], [0, 3]]


def test_no_positive_predictions_give_precision_zero_without_a_warning() -> None:
    values = point_metrics(LABELS, PROBABILITIES, 1.0)
    assert (values["precision"], values["f1"], values["recall"]) == (0, 0, 0)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_no_metrics(label: int) -> None:
    with pytest.raises(ValueError, match="both classes"):
        point_metrics(np.full(3, label), np.array([0.2, 0.5, 0.7]))


@given(cases())
@settings(max_examples=60)
def test_calibration_error_is_the_gap_between_probability_and_frequency_in_bins(case: Case) -> None:
    labels, probabilities, _ = case
    expected = 0.0
    for k in range(15):
        inside = [k == min(int(p * 15), 14) for p in probabilities]
        if any(inside):
            expected += np.mean(inside) * abs(labels[inside].mean() - probabilities[inside].mean())
    assert expected_calibration_error(labels, probabilities) == pytest.approx(expected, abs=1e-12)


@given(cases())
@settings(max_examples=60)
def test_the_confusion_matrix_counts_every_image_once(case: Case) -> None:
    labels, probabilities, threshold = case
    counts = confusion(labels, probabilities, threshold)
    assert counts.sum(1).tolist() == [(labels == 0).sum(), (labels == 1).sum()]
    assert counts[:, 1].sum() == (probabilities >= threshold).sum()


def test_recall_by_subtype_uses_positives_only() -> None:
    subtypes = pd.Series(["normal", "normal", "normal", "virus", "bacteria", "bacteria"], index=range(7, 13))
    assert recall_by_subtype(LABELS, PROBABILITIES, subtypes, 0.5) == {"virus": 0.0, "bacteria": 1.0}


def test_the_text_report_names_the_classes() -> None:
    text = classification_report(LABELS, PROBABILITIES, ("NORMAL", "PNEUMONIA"))
    assert "NORMAL" in text
    assert "0.6667" in text


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=20), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=60)
def test_a_resample_draws_as_many_whole_groups_as_there_are(groups: list[str], resamples: int, seed: int) -> None:
    weights = group_weights(groups, resamples, seed)
    assert weights.shape == (resamples, len(groups))
    firsts = [groups.index(group) for group in sorted(set(groups))]
    assert weights[:, firsts].sum(1).tolist() == [len(firsts)] * resamples
    for column, group in enumerate(groups):
        assert (weights[:, column] == weights[:, groups.index(group)]).all()


def test_missing_groups_are_a_group_of_their_own() -> None:
    groups: list[Any] = [None, "a"]
    weights = group_weights(groups, 50)
    assert (weights[:, 0] != weights[:, 1]).any()


def test_group_weights_depend_only_on_the_seed() -> None:
    groups = list("aabbcdde")
    assert (group_weights(groups, 5, 1) == group_weights(groups, 5, 1)).all()
    assert (group_weights(groups, 5, 1) != group_weights(groups, 5, 2)).any()


@given(cases())
@settings(max_examples=25)
def test_intervals_are_ordered_within_bounds_and_wider_at_a_higher_level(case: Case) -> None:
    labels, probabilities, threshold = case
    # One group has both classes, so that hardly a resample lacks one.
    groups = ["both" if i in (labels.argmin(), labels.argmax()) else f"g{i}" for i in range(len(labels))]
    narrow = intervals(labels, probabilities, groups, 200, partial(weighted_metrics, threshold=threshold), level=0.5)
    wide = intervals(labels, probabilities, groups, 200, partial(weighted_metrics, threshold=threshold), level=0.95)
    for name in METRICS:
        largest = 28 if name == "log_loss" else 1  # nats of a certain error, clipped
        if np.isnan(wide[name]).all():  # nothing varies
            assert np.isnan(narrow[name]).all()
            continue
        assert 0 <= wide[name][0] <= narrow[name][0] <= narrow[name][1] <= wide[name][1] <= largest + 1e-12, name


def test_one_group_has_no_interval() -> None:
    labels, probabilities = np.array([0, 1, 1]), np.array([0.2, 0.9, 0.4])
    found = intervals(labels, probabilities, ["a", "a", "a"], 20, AT_HALF)
    assert all(np.isnan(bounds).all() for bounds in found.values())


def test_perfect_recall_gets_the_exact_interval_for_the_patients() -> None:
    """Clopper and Pearson: for 20 of 20 the lower bound is 0.025^(1/20)."""
    labels = np.repeat([0, 1], [40, 40])
    probabilities = np.where(labels == 1, 0.9, np.tile([0.1, 0.2, 0.6, 0.3], 20))
    found = intervals(labels, probabilities, [f"p{i // 2}" for i in range(80)], 200, AT_HALF)
    assert found["recall"] == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert found["specificity"][0] < 0.75 < found["specificity"][1]
    assert np.isnan(found["roc_auc"]).all()


def test_images_of_a_patient_make_the_interval_wider_than_independent_images_do() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    probabilities = np.clip(labels * 0.3 + rng.random(40) * 0.7, 0, 1)
    five = [np.tile(values, 5) for values in (labels, probabilities)]
    alone = intervals(five[0], five[1], [str(i) for i in range(200)], 300, AT_HALF)
    grouped = intervals(five[0], five[1], [str(i % 40) for i in range(200)], 300, AT_HALF)
    for name in (*DECISION_METRICS, "roc_auc", "brier"):
        assert np.diff(grouped[name]) > 1.5 * np.diff(alone[name]), name


def test_without_resamples_there_is_no_interval() -> None:
    assert np.isnan(list(intervals(LABELS, PROBABILITIES, list("abcdef"), 0, AT_HALF).values())).all()


def test_resamples_that_all_lack_a_class_give_no_interval_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr.evaluation.metrics.group_weights", lambda groups, resamples: np.array([[2.0, 0.0]]))
    bounds = intervals(np.array([0, 1]), np.array([0.2, 0.8]), ["a", "b"], 1, AT_HALF)
    assert np.isnan(bounds["recall"]).all()
    assert bounds["accuracy"] == (pytest.approx(0.025**0.5), 1)  # the exact one for two patients
