from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from cxr.evaluation.selective import (
    COVERAGES,
    accuracy_at_coverage,
    certainty,
    certainty_limit,
    estimated_accuracy,
    selective_accuracy,
)

fractions = st.lists(st.floats(0, 1), min_size=20, max_size=60)


@given(fractions, st.floats(0.01, 0.99))
def test_certainty_is_nothing_at_the_threshold_and_grows_with_the_distance(
    values: list[float], threshold: float
) -> None:
    probabilities = np.sort(np.array(values))
    found = certainty(probabilities, threshold)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    above, below = found[probabilities >= threshold], found[probabilities <= threshold]
    assert (np.diff(above) >= 0).all()
    assert (np.diff(below) <= 0).all()
    assert certainty(np.array([threshold]), threshold)[0] == 0


@given(fractions, st.floats(0.0, 0.9))
def test_about_the_asked_fraction_of_validation_lies_below_the_limit(values: list[float], fraction: float) -> None:
    certainties = certainty(np.array(values), 0.5)
    below = certainties < certainty_limit(certainties, fraction)
    assert below.mean() <= fraction + 1 / len(values)  # the quantile lies between two images
    if len(np.unique(certainties)) == len(certainties):
        assert below.mean() >= fraction - 1 / len(values) - 1e-9
    assert not (certainties < certainty_limit(certainties, 0)).any()


@settings(max_examples=50)
@given(st.integers(5, 80), st.integers(0, 10**6))
def test_accuracy_at_a_coverage_is_that_of_the_most_certain_images(images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    correct, certainties = rng.integers(0, 2, images), rng.permutation(images).astype(float)
    (found,) = accuracy_at_coverage(correct, certainties, np.ones((1, images)))
    for coverage, accuracy in zip(COVERAGES, found, strict=True):
        kept = np.argsort(-certainties)[: int(np.ceil(coverage * images - 1e-9))]
        assert accuracy == pytest.approx(accuracy_score(np.ones(len(kept)), correct[kept]))


@settings(max_examples=30)
@given(st.integers(5, 40), st.integers(0, 10**6))
def test_weights_count_images_as_often_as_they_say(images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    correct, certainties = rng.integers(0, 2, images), rng.permutation(images).astype(float)
    weights = rng.integers(0, 4, images)
    weights[0] = 1
    repeated = np.repeat(np.arange(images), weights)
    (weighted,) = accuracy_at_coverage(correct, certainties, weights[None].astype(float))
    (plain,) = accuracy_at_coverage(correct[repeated], certainties[repeated], np.ones((1, len(repeated))))
    assert weighted[-1] == pytest.approx(plain[-1])
    assert ((weighted >= 0) & (weighted <= 1)).all()


def test_where_the_certain_are_right_accuracy_falls_with_coverage_and_the_band_holds_it() -> None:
    rng = np.random.default_rng(0)
    certainties = rng.uniform(0, 3, 600)
    correct = (rng.uniform(size=600) < 0.6 + 0.13 * certainties).astype(np.int64)
    found = selective_accuracy(correct, certainties, [str(i // 2) for i in range(600)], 200)
    assert found.accuracy[3] > found.accuracy[-1] + 0.05
    assert ((found.low <= found.accuracy) & (found.accuracy <= found.high)).all()
    assert np.isnan(selective_accuracy(correct, certainties, ["a"] * 600, 0).low).all()


@settings(max_examples=50)
@given(st.integers(2, 80), st.integers(0, 10**6))
def test_the_estimate_for_validation_itself_is_its_accuracy(images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    correct, sure = rng.integers(0, 2, images), rng.permutation(images).astype(float)
    ones = np.ones((1, images))
    assert estimated_accuracy(correct, sure, sure, (ones, ones))[0] == pytest.approx(correct.mean())


def test_the_estimate_falls_with_certainty_and_is_near_the_truth_where_errors_are_uncertain() -> None:
    rng = np.random.default_rng(0)

    def draw(scale: float, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
        sure = rng.exponential(scale, count)
        return (rng.uniform(size=count) < 1 / (1 + np.exp(-sure))).astype(np.int64), sure

    val, found = draw(3), []
    for scale in (3, 2, 1):
        correct, sure = draw(scale)
        weights = (np.ones((1, 4000)), np.ones((1, 4000)))
        found.append(float(estimated_accuracy(*val, sure, weights)[0]))
        assert found[-1] == pytest.approx(correct.mean(), abs=0.15)
    assert found == sorted(found, reverse=True)
