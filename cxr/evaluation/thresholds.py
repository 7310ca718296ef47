"""Rules that choose a decision threshold on validation predictions."""

from __future__ import annotations

import re

import numpy as np

from cxr.config import check_rule
from cxr.evaluation.calibration import _EDGE
from cxr.evaluation.metrics import Floats, Ints


def choose_threshold(rule: str, labels: Ints, probabilities: Floats) -> float:
    """The threshold that a rule takes on labels [n] and probabilities [n]; at or above it is positive.

    `youden` has the largest recall + specificity (Youden 1950), `f1` the largest F1, `cost a:b` the least a * missed +
    b * false alarms, `sensitivity>=x` the highest threshold with that recall. It lies half-way between two
    probabilities that occur; of equals, the one nearest 0.5 is taken.
    """
    check_rule(rule)
    if re.fullmatch(r"0?\.\d+", rule):
        return float(rule)
    probabilities = np.clip(probabilities, _EDGE, 1 - _EDGE)
    levels = np.unique(probabilities)
    candidates = np.concatenate([[levels[0] / 2], (levels[1:] + levels[:-1]) / 2, [(1 + levels[-1]) / 2]])
    score = _scores(rule, labels, probabilities, candidates)
    best = candidates[score >= score.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _scores(rule: str, labels: Ints, probabilities: Floats, candidates: Floats) -> Floats:
    """What the rule makes largest, for each candidate."""
    positives, negatives = np.sort(probabilities[labels == 1]), np.sort(probabilities[labels == 0])
    missed = np.searchsorted(positives, candidates, side="left").astype(np.float64)
    alarms = len(negatives) - np.searchsorted(negatives, candidates, side="left").astype(np.float64)
    recall = 1 - missed / len(positives)
    if rule == "youden":
        return np.asarray(recall - alarms / len(negatives))
    if rule == "f1":
        found = len(positives) - missed
        return np.asarray(2 * found / (2 * found + missed + alarms))
    if rule.startswith("sensitivity>="):
        return np.where(recall >= float(rule.removeprefix("sensitivity>=")) - 1e-12, candidates, -1.0)
    missing, alarming = map(float, rule.removeprefix("cost ").split(":"))
    return np.asarray(-(missing * missed + alarming * alarms))
