"""Metrics of more than two classes, under the names of those of two: their means over the classes, each against the
rest, and beside them those of each class.

`weighted_multiclass` computes them for many weightings at once; with one weight of 1 an image, they are scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn import metrics as sk

from cxr.evaluation.metrics import ECE_BINS, Floats, Ints, from_counts, ranking_metrics

PER_CLASS = ("recall", "precision", "f1", "roc_auc", "pr_auc")
MEANS = ("precision", "recall", "specificity", "f1", "roc_auc", "pr_auc")
_EDGE = 1e-12  # probabilities are clipped by this much before taking logarithms


def multiclass_metrics(labels: Ints, probabilities: Floats, names: Sequence[str]) -> dict[str, float]:
    """Every metric for labels [n] and probabilities [n, k] of the k classes `names`; the most probable class decides.

    `recall`, `precision`, `specificity`, `f1`, `roc_auc` and `pr_auc` are means over the classes, each against the
    rest; `recall_of_NAME` and so on those of one class. `balanced_accuracy` is the mean recall. `brier` is half of the
    sum over classes, so that it ranges from 0 to 1; `ece` is that of the decided class. Raises `ValueError` if a class
    is absent.
    """
    if set(np.unique(labels)) != set(range(len(names))):
        raise ValueError("every class is needed to compute the metrics")
    found = weighted_multiclass(labels, probabilities, np.ones((1, len(labels))), names)
    return {name: float(values[0]) for name, values in found.items()}


def weighted_multiclass(
    labels: Ints, probabilities: Floats, weights: Floats, names: Sequence[str]
) -> dict[str, Floats]:
    """Every metric [b] for each of the b weightings [b, n] of the same images; NaN where undefined."""
    decided, total = probabilities.argmax(1), weights.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = [_against_the_rest(labels == c, decided == c, probabilities[:, c], weights) for c in range(len(names))]
        means = {name: np.mean([one[name] for one in each], axis=0) for name in MEANS}
        found = {"accuracy": weights @ (labels == decided) / total, "balanced_accuracy": means["recall"], **means}
    truth = np.eye(len(names))[labels]
    likelihoods = np.clip((probabilities * truth).sum(1), _EDGE, 1.0)
    found["brier"] = weights @ ((probabilities - truth) ** 2).sum(1) / 2 / total
    found["log_loss"] = weights @ -np.log(likelihoods) / total
    found["ece"] = _top_label_ece(weights, labels == decided, probabilities.max(1))
    return found | {f"{m}_of_{name}": one[m] for m in PER_CLASS for name, one in zip(names, each, strict=True)}


def _against_the_rest(
    positive: npt.NDArray[np.bool_], decided: npt.NDArray[np.bool_], probabilities: Floats, weights: Floats
) -> dict[str, Floats]:
    """The metrics of one class against all others."""
    tp, fn = weights @ (positive & decided), weights @ (positive & ~decided)
    fp, tn = weights @ (~positive & decided), weights @ (~positive & ~decided)
    return from_counts(tp, fp, fn, tn) | ranking_metrics(positive, probabilities, weights)


def _top_label_ece(weights: Floats, correct: npt.NDArray[np.bool_], confidence: Floats) -> Floats:
    """|sum of (correct - confidence)| in each bin of confidence, summed over bins and divided by the total weight.

    The expected calibration error of Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    index = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gap = weights @ ((correct - confidence)[:, None] * (index[:, None] == np.arange(ECE_BINS)))
    total: Floats = np.abs(gap).sum(1) / weights.sum(1)
    return total


def multiclass_report(labels: Ints, decisions: Ints, names: Sequence[str]) -> str:
    """scikit-learn's text table of precision, recall and F1 for each class."""
    every = list(range(len(names)))
    return str(
        sk.classification_report(labels, decisions, labels=every, target_names=list(names), digits=4, zero_division=0)
    )
