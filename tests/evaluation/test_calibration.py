from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import confusion_matrix, f1_score, log_loss

from cxr.errors import UserError
from cxr.evaluation.calibration import (
    IDENTITY,
    Calibration,
    CalibrationMethod,
    correct_prior,
    estimate_prior,
    fit_calibration,
)
from cxr.evaluation.thresholds import choose_threshold
from cxr.threshold_rule import ThresholdRule

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def sample(slope: float, offset: float, count: int = 20_000, seed: int = 0) -> tuple[Floats, Ints]:
    """Margins and labels whose true probability is sigmoid(slope * margin + offset)."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(0, 3, count)
    return margins, (rng.random(count) < expit(slope * margins + offset)).astype(np.int64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found(temperature: float) -> None:
    margins, labels = sample(1 / temperature, 0)
    fitted = fit_calibration("temperature", margins, labels)
    assert 1 / fitted.slope == pytest.approx(temperature, rel=0.05)
    assert fitted.offset == 0
    assert f"temperature {1 / fitted.slope:.3f}" == fitted.words()


def test_platt_finds_slope_and_offset() -> None:
    fitted = fit_calibration("platt", *sample(0.4, -1.2))
    assert (fitted.slope, fitted.offset) == (pytest.approx(0.4, rel=0.05), pytest.approx(-1.2, rel=0.05))


def test_platt_fits_at_least_as_well_as_temperature_and_temperature_as_none() -> None:
    margins, labels = sample(0.3, 0.8, 3000)
    losses = [log_loss(labels, fit_calibration(m, margins, labels).apply(margins)) for m in ("platt", "temperature")]
    assert losses[0] < losses[1] < log_loss(labels, IDENTITY.apply(margins))


def test_perfect_separation_gives_a_finite_slope() -> None:
    margins = np.concatenate([np.linspace(-5, -1, 20), np.linspace(1, 5, 20)])
    fitted = fit_calibration("temperature", margins, (margins > 0).astype(np.int64))
    assert 0 < fitted.slope < 10


def test_a_ranking_is_never_inverted() -> None:
    margins, labels = sample(-1, 0, 500)
    fitted = fit_calibration("temperature", margins, labels)
    assert (fitted.slope, fitted.offset) == (1, 0)
    assert "invert the ranking" in fitted.words()


@given(st.integers(0, 10_000), st.sampled_from(["temperature", "platt"]))
def test_calibration_keeps_the_ranking(seed: int, method: str) -> None:
    margins, labels = sample(0.7, 0.3, 60, seed)
    if len(set(labels)) == 2:
        probabilities = fit_calibration(method, margins, labels).apply(margins)
        assert np.array_equal(np.argsort(margins), np.argsort(probabilities))


shares = st.integers(1, 999).map(lambda number: number / 1000)
scored = st.lists(st.tuples(st.booleans(), shares), min_size=4, max_size=40).filter(
    lambda pairs: len({label for label, _ in pairs}) == 2
)


def brute(rule: str, labels: Ints, decided: npt.NDArray[np.bool_]) -> float:
    """The objective of the rule, computed with scikit-learn."""
    tn, fp, fn, tp = confusion_matrix(labels, decided, labels=[0, 1]).ravel()
    if rule == "youden":
        return float(tp / (tp + fn) + tn / (tn + fp))
    return float(f1_score(labels, decided, zero_division=0)) if rule == "f1" else float(-(5 * fn + 2 * fp))


@given(scored, st.sampled_from(["youden", "f1", "cost 5:2"]))
def test_no_other_threshold_is_better_by_the_rule(pairs: list[tuple[bool, float]], rule: str) -> None:
    labels, scores = np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs])
    chosen = choose_threshold(ThresholdRule.parse(rule), labels, scores)
    others = [brute(rule, labels, scores >= t) for t in [0.0, *np.unique(scores), 1.1]]
    assert 0 < chosen < 1
    assert brute(rule, labels, scores >= chosen) >= max(others) - 1e-9


@given(scored, st.floats(0.1, 1))
def test_the_required_sensitivity_is_reached_by_the_highest_threshold(
    pairs: list[tuple[bool, float]], wanted: float
) -> None:
    labels, scores = np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs])
    chosen = choose_threshold(ThresholdRule.parse(f"sensitivity>={wanted:.3f}"), labels, scores)
    recall = (scores[labels == 1] >= chosen).mean()
    above = np.unique(scores[scores >= chosen])
    assert recall >= round(wanted, 3) - 1e-9
    if len(above):  # one step higher would lose a positive that is needed, or there is no such step
        higher = (scores[labels == 1] > above[0]).mean()
        assert higher < round(wanted, 3) or above[0] == scores.max()


def test_a_number_is_used_unchanged() -> None:
    assert choose_threshold(ThresholdRule.parse("0.3"), np.array([0, 1]), np.array([0.2, 0.9])) == 0.3


@pytest.mark.parametrize("rule", ["best", "sensitivity>=1.5", "sensitivity>=0", "cost 0:0", "cost 5", "1.5", "", "-1"])
def test_an_invalid_rule_is_rejected(rule: str) -> None:
    with pytest.raises(UserError, match="--threshold"):
        ThresholdRule.parse(rule)


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(0.001, 0.999))
def test_a_prior_correction_can_be_reversed(before: float, after: float, probability: float) -> None:
    there = correct_prior(np.array([probability]), before, after)
    assert correct_prior(there, after, before)[0] == pytest.approx(probability, abs=1e-9)
    assert (there[0] > probability) == (after > before) or there[0] == pytest.approx(probability)


def test_the_prior_of_unlabelled_images_is_estimated() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(20_000) < 0.4).astype(np.int64)
    margins = rng.normal(2 * (2 * labels - 1), 2)  # log likelihood ratio is the margin itself
    probabilities = expit(margins + np.log(0.75 / 0.25))  # these assume a prevalence of 0.75
    assert estimate_prior(probabilities, 0.75) == pytest.approx(0.4, abs=0.02)


def test_full_sensitivity_is_reached_with_probabilities_close_to_zero() -> None:
    labels, probabilities = np.array([0, 1, 1, 1]), np.array([0.2, 1e-14, 0.7, 0.9])
    assert choose_threshold(ThresholdRule.parse("sensitivity>=1"), labels, probabilities) <= 1e-12


@pytest.mark.parametrize(
    "fitted",
    [
        IDENTITY,
        Calibration(CalibrationMethod.PLATT, 0.8, 0.1),
        Calibration(CalibrationMethod.NONE, refused_slope=-0.25),
    ],
)
def test_a_calibration_is_restored_from_a_card(fitted: Calibration) -> None:
    assert Calibration.from_card(json.loads(json.dumps(asdict(fitted)))) == fitted


def test_a_card_of_version_0_1_is_read() -> None:
    card = {"method": "none (validation would turn the ranking round: slope -0.25)", "slope": 1.0, "offset": 0.0}
    assert Calibration.from_card(card) == Calibration(CalibrationMethod.NONE, refused_slope=-0.25)
    assert Calibration.from_card({"method": "temperature", "slope": 0.5, "offset": 0.0}).slope == 0.5


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (Calibration(CalibrationMethod.PLATT, 0.5, -0.25), "Platt, slope 0.500, offset -0.250"),
        (IDENTITY, "none"),
        (
            Calibration(CalibrationMethod.NONE, refused_slope=-0.125),
            "none (validation would invert the ranking: slope -0.125)",
        ),
    ],
)
def test_a_calibration_is_described_and_read_back_from_its_card(calibration: Calibration, words: str) -> None:
    assert calibration.words() == words
    assert Calibration.from_card(json.loads(json.dumps(asdict(calibration)))) == calibration


def test_without_calibration_nothing_is_fitted() -> None:
    assert fit_calibration("none", *sample(0.4, -1.2)) is IDENTITY
