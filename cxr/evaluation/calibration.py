"""Calibration of probabilities, fitted on validation, and correction for a different prevalence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.linear_model import LogisticRegression

from cxr.errors import UserError
from cxr.evaluation.metrics import Floats, Ints

_EDGE = 1e-12  # probabilities are clipped by this much


class CalibrationMethod(StrEnum):
    """How logits become probabilities; the values are those of `--calibration`."""

    TEMPERATURE = "temperature"
    PLATT = "platt"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Calibration:
    """P(positive) = sigmoid(slope * margin + offset), where margin is the positive logit minus the other.

    Of more than two classes, softmax(slope * logits).
    """

    method: CalibrationMethod
    slope: float = 1.0
    offset: float = 0.0
    refused_slope: float | None = None

    def apply(self, margins: Floats) -> Floats:
        """Probabilities [n] of margins [n]."""
        probabilities: Floats = expit(self.slope * margins + self.offset)
        return probabilities

    def probabilities(self, logits: npt.NDArray[np.floating]) -> Floats:
        """Probabilities [n, k] of logits [n, k]."""
        if logits.shape[1] > 2:
            return np.asarray(softmax(self.slope * logits.astype(np.float64), axis=1))
        positive = self.apply(margins_of(logits))
        return np.stack([1 - positive, positive], 1)

    def words(self) -> str:
        """A description: the method and its parameters."""
        if self.method is CalibrationMethod.TEMPERATURE:
            return f"temperature {1 / self.slope:.3f}"
        if self.method is CalibrationMethod.PLATT:
            return f"Platt, slope {self.slope:.3f}, offset {self.offset:+.3f}"
        if self.refused_slope is None:
            return "none"
        return f"none (validation would invert the ranking: slope {self.refused_slope:.3g})"

    @classmethod
    def from_card(cls, fields: Mapping[str, Any]) -> Self:
        """From the fields in a model's card; version 0.1 wrote the reason for no calibration into the method."""
        method, reason = str(fields["method"]), {}
        if match := re.search(r"slope ([^)]+)\)", method):
            reason = {"refused_slope": float(match[1])}
        return cls(**{**fields, **reason, "method": CalibrationMethod(method.split(" ")[0])})


IDENTITY = Calibration(CalibrationMethod.NONE)


def fit_calibration(method: str, margins: Floats, labels: Ints) -> Calibration:
    """Fit on validation margins [n] and labels [n].

    Temperature scaling (Guo et al. 2017) is a logistic regression on the margin without an offset, Platt's method
    (1999) one with it; both with Platt's smoothed targets, which keep the slope finite if the validation classes
    are perfectly separated. A slope that is not positive would invert the ranking: the result is then the identity, and
    `refused_slope` says so.
    """
    if method == CalibrationMethod.NONE:
        return IDENTITY
    positives = int(labels.sum())
    high, low = (positives + 1) / (positives + 2), 1 / (len(labels) - positives + 2)
    share = np.where(labels == 1, high, low)
    model = LogisticRegression(C=np.inf, fit_intercept=method == "platt", tol=1e-8, max_iter=1000)
    model.fit(
        np.tile(margins, 2)[:, None], np.repeat([1, 0], len(labels)), sample_weight=np.concatenate([share, 1 - share])
    )
    slope, offset = float(model.coef_[0, 0]), float(np.ravel(model.intercept_)[0])
    if slope <= 0:
        return Calibration(CalibrationMethod.NONE, refused_slope=slope)
    return Calibration(CalibrationMethod(method), slope, offset)


def fit_temperature(logits: Floats, labels: Ints) -> Calibration:
    """Temperature scaling (Guo et al. 2017) of more than two classes, fitted on validation logits [n, k] and labels.

    Targets are smoothed as in `fit_calibration`, so that the slope stays finite where all decisions are right.
    """
    classes = logits.shape[1]
    counts = np.bincount(labels, minlength=classes)[labels]
    share = (counts + 1) / (counts + classes)
    truth = np.eye(classes)[labels]
    targets = truth * share[:, None] + (1 - truth) * ((1 - share) / (classes - 1))[:, None]

    def loss(log_slope: float) -> float:
        return -float((targets * log_softmax(np.exp(log_slope) * logits, axis=1)).sum())

    found = minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded", options={"xatol": 1e-8})
    return Calibration(CalibrationMethod.TEMPERATURE, float(np.exp(found.x)))


def fit(method: str, logits: Floats, labels: Ints) -> Calibration:
    """The calibration of validation logits [n, k] and labels [n].

    Raises `UserError` for Platt scaling of more than two classes.
    """
    if logits.shape[1] == 2:
        return fit_calibration(method, margins_of(logits), labels)
    if method == CalibrationMethod.PLATT:
        raise UserError(f"--calibration platt: is for two classes, not {logits.shape[1]}; use temperature or none")
    return fit_temperature(logits, labels) if method == CalibrationMethod.TEMPERATURE else IDENTITY


def correct_prior(probabilities: Floats, before: float, after: float) -> Floats:
    """Probabilities [n] corrected for a different prevalence of the positive class, all else equal (Elkan 2001).

    `before` is the prevalence that they assume, `after` the actual one; both between 0 and 1.
    """
    shift = logit(after) - logit(before)
    corrected: Floats = expit(logit(np.clip(probabilities, _EDGE, 1 - _EDGE)) + shift)
    return corrected


def estimate_prior(probabilities: Floats, before: float, steps: int = 1000) -> float:
    """The prevalence of the positive class among unlabelled images, by expectation
    maximisation (Saerens et al. 2002)."""
    share = before
    for _ in range(steps):
        new = float(correct_prior(probabilities, before, float(np.clip(share, 1e-6, 1 - 1e-6))).mean())
        if abs(new - share) < 1e-9:
            break
        share = new
    return share


def margins_of(logits: npt.NDArray[np.floating]) -> Floats:
    """Logits [n, 2] -> the positive logit minus the other [n]."""
    exact = logits.astype(np.float64)
    return np.asarray(exact[:, 1] - exact[:, 0])
