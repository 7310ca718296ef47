"""Rules that choose a decision threshold on validation predictions."""

from __future__ import annotations

import numpy as np

from cxr.evaluation.calibration import _EDGE
from cxr.evaluation.metrics import Floats, Ints
from cxr.threshold_rule import RuleKind, ThresholdRule


def choose_threshold(rule: ThresholdRule, labels: Ints, probabilities: Floats) -> float:
    """The threshold that a rule takes on labels [n] and probabilities [n]; at or above it is positive.

    `youden` has the largest recall + specificity (Youden 1950), `f1` the largest F1, `cost a:b` the least a * missed +
    b * false alarms, `sensitivity>=x` the highest threshold with that recall. It lies half-way between two
    probabilities that occur; of equals, the one nearest 0.5 is taken.
    """
    if rule.kind is RuleKind.FIXED:
        return rule.value
    probabilities = np.clip(probabilities, _EDGE, 1 - _EDGE)
    levels = np.unique(probabilities)
    candidates = np.concatenate([[levels[0] / 2], (levels[1:] + levels[:-1]) / 2, [(1 + levels[-1]) / 2]])
    score = _scores(rule, labels, probabilities, candidates)
    best = candidates[score >= score.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _scores(rule: ThresholdRule, labels: Ints, probabilities: Floats, candidates: Floats) -> Floats:
    """What the rule makes largest, for each candidate."""
    positives, negatives = np.sort(probabilities[labels == 1]), np.sort(probabilities[labels == 0])
    missed = np.searchsorted(positives, candidates, side="left").astype(np.float64)
    alarms = len(negatives) - np.searchsorted(negatives, candidates, side="left").astype(np.float64)
    recall = 1 - missed / len(positives)
    if rule.kind is RuleKind.YOUDEN:
        return np.asarray(recall - alarms / len(negatives))
    if rule.kind is RuleKind.F1:
        found = len(positives) - missed
        return np.asarray(2 * found / (2 * found + missed + alarms))
    if rule.kind is RuleKind.SENSITIVITY:
        return np.where(recall >= rule.value - 1e-12, candidates, -1.0)
    return np.asarray(-(rule.false_negative * missed + rule.false_positive * alarms))
