"""Metrics from labels and probabilities, with bootstrap intervals that resample groups (patients).

Point values are scikit-learn's. The intervals need each metric for a thousand weightings of the same images;
`weighted_metrics` computes them in one call, and a property test compares it with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest
from sklearn import metrics as sk

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Interval = tuple[float, float, float]
DECISION_METRICS = ("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1")
SCORE_METRICS = ("roc_auc", "pr_auc", "brier", "log_loss", "ece")
METRICS = DECISION_METRICS + SCORE_METRICS
RANGES = {"log_loss": (0.0, np.inf)}  # (lowest, highest possible value) of the metrics that do not range from 0 to 1
ECE_BINS = 15
_EDGE = 1e-12  # probabilities are clipped by this much before taking logarithms


def range_of(metric: str) -> tuple[float, float]:
    """(lowest, highest) possible value of a metric, also under its name at the chosen threshold."""
    return RANGES.get(metric.removeprefix("chosen_"), (0.0, 1.0))


def point_metrics(labels: Ints, probabilities: Floats, threshold: float = 0.5) -> dict[str, float]:
    """Every metric of `METRICS` for labels [n] (0, 1) and probabilities of class 1 [n].

    A decision is positive at or above `threshold`. Without positive predictions, precision and F1 are 0.
    Raises `ValueError` if a class is absent, as most metrics are then undefined.
    """
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError("both classes are needed to compute the metrics")
    return {
        **decision_metrics(labels, probabilities, threshold),
        "roc_auc": float(sk.roc_auc_score(labels, probabilities)),
        "pr_auc": float(sk.average_precision_score(labels, probabilities)),
        "brier": float(sk.brier_score_loss(labels, probabilities)),
        "log_loss": float(_log_losses(labels, probabilities).mean()),
        "ece": expected_calibration_error(labels, probabilities),
    }


def decision_metrics(labels: Ints, probabilities: Floats, threshold: float) -> dict[str, float]:
    """The metrics of `point_metrics` that depend on the threshold: `DECISION_METRICS`."""
    decisions = (probabilities >= threshold).astype(np.int64)
    return {
        "accuracy": float(sk.accuracy_score(labels, decisions)),
        "balanced_accuracy": float(sk.balanced_accuracy_score(labels, decisions)),
        "precision": float(sk.precision_score(labels, decisions, zero_division=0)),
        "recall": float(sk.recall_score(labels, decisions)),
        "specificity": float(sk.recall_score(labels, decisions, pos_label=0)),
        "f1": float(sk.f1_score(labels, decisions, zero_division=0)),
    }


def _log_losses(labels: Ints, probabilities: Floats) -> Floats:
    """The negative log-likelihood [n] of each label."""
    likelihoods = np.where(labels == 1, probabilities, 1 - probabilities)
    losses: Floats = -np.log(np.clip(likelihoods, _EDGE, 1.0))
    return losses


def expected_calibration_error(labels: Ints, probabilities: Floats, bins: int = ECE_BINS) -> float:
    """The mean absolute difference of probability and frequency of class 1 over equal-width bins, weighted by count.

    The binary form of Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    return float(_ece(np.ones((1, len(labels))), labels, probabilities, bins)[0])


def confusion(labels: Ints, probabilities: Floats, threshold: float = 0.5) -> Ints:
    """Counts [2, 2]: rows are the true class, columns the decision."""
    counts: Ints = sk.confusion_matrix(labels, probabilities >= threshold, labels=[0, 1])
    return counts


def counts_of(labels: Ints, decisions: Ints, classes: int) -> Ints:
    """Counts [k, k] of labels [n] and decisions [n] of `classes` classes: rows are the true class."""
    counts: Ints = sk.confusion_matrix(labels, decisions, labels=list(range(classes)))
    return counts


def classification_report(labels: Ints, probabilities: Floats, names: Sequence[str], threshold: float = 0.5) -> str:
    """scikit-learn's text table of precision, recall and F1 for each class."""
    decisions = (probabilities >= threshold).astype(np.int64)
    report = sk.classification_report(labels, decisions, target_names=list(names), digits=4, zero_division=0)
    return str(report)


def recall_by_subtype(
    labels: Ints, probabilities: Floats, subtypes: pd.Series, threshold: float = 0.5
) -> dict[str, float]:
    """The recall of each pneumonia subtype (bacteria, virus, …)."""
    detected = pd.Series(probabilities >= threshold)[labels == 1]
    return {str(k): float(v) for k, v in detected.groupby(subtypes.to_numpy()[labels == 1]).mean().items()}


def group_weights(groups: Sequence[str], resamples: int, seed: int = 0) -> Floats:
    """Bootstrap weights [resamples, n]: how often each image is drawn when groups are drawn with replacement.

    The cluster bootstrap (Field and Welsh 2007): images of one patient are not independent.
    """
    codes, uniques = pd.factorize(np.asarray(groups, dtype=object), use_na_sentinel=False)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(uniques), np.full(len(uniques), 1 / len(uniques)), size=resamples)
    return drawn[:, codes].astype(np.float64)


def intervals(
    labels: Ints,
    probabilities: Floats,
    groups: Sequence[str],
    resamples: int,
    replicate: Callable[[Ints, Floats, Floats], dict[str, Floats]],
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """The percentile bootstrap interval (low, high) of every metric; (nan, nan) if it is undefined in all resamples or
    if there is only one group.

    `replicate` computes the metrics [b] from labels, probabilities and weights [b, n], e.g. `weighted_metrics` with its
    threshold bound by `functools.partial`. If all resamples agree (e.g. 40 of 40 detected), recall, specificity and
    accuracy get the exact interval (Clopper and Pearson 1934) with the number of groups as the number of trials; the
    other metrics have none.
    """
    replicates = replicate(labels, probabilities, group_weights(groups, resamples))
    names, positive = np.asarray(groups, dtype=object), labels == 1
    chosen = {"recall": positive, "specificity": ~positive, "accuracy": np.ones(len(labels), bool)}
    trials = {name: len(set(names[rows])) for name, rows in chosen.items()}
    return percentile_bounds(replicates, trials, len(set(groups)), level)


def percentile_bounds(
    replicates: Mapping[str, Floats], trials: Mapping[str, int], groups: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """The interval of each metric from its bootstrap `replicates` [b]; (nan, nan) for fewer than two groups.

    `trials` are the groups that a share counts, for an exact interval where all resamples agree.
    """
    tails, nothing = [(1 - level) / 2, (1 + level) / 2], (float("nan"), float("nan"))
    return {
        name: _quantiles(values, tails, trials.get(name, 0)) if groups > 1 else nothing
        for name, values in replicates.items()
    }


def _quantiles(values: Floats, tails: list[float], trials: int) -> tuple[float, float]:
    """The interval of one metric; resamples in which it is undefined (a class is absent) are left out."""
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    if known.min() < known.max():
        low, high = np.quantile(known, tails)
        return float(low), float(high)
    if known[0] not in (0, 1) or not trials:
        return float("nan"), float("nan")
    exact = binomtest(round(known[0] * trials), trials).proportion_ci(tails[1] - tails[0])
    return float(exact.low), float(exact.high)


def weighted_metrics(labels: Ints, probabilities: Floats, weights: Floats, threshold: float) -> dict[str, Floats]:
    """Every metric [b] for each of the b weightings [b, n] of the same images; nan where undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            **weighted_decisions(labels, probabilities, weights, threshold),
            **ranking_metrics(labels == 1, probabilities, weights),
            "brier": weights @ (probabilities - labels) ** 2 / weights.sum(1),
            "log_loss": weights @ _log_losses(labels, probabilities) / weights.sum(1),
            "ece": _ece(weights, labels, probabilities, ECE_BINS),
        }


def weighted_decisions(labels: Ints, probabilities: Floats, weights: Floats, threshold: float) -> dict[str, Floats]:
    """The metrics of `weighted_metrics` that depend on the threshold: `DECISION_METRICS`."""
    positive, decided = labels == 1, probabilities >= threshold
    tp, fn = weights @ (positive & decided), weights @ (positive & ~decided)
    fp, tn = weights @ (~positive & decided), weights @ (~positive & ~decided)
    with np.errstate(divide="ignore", invalid="ignore"):
        return from_counts(tp, fp, fn, tn)


def from_counts(tp: Floats, fp: Floats, fn: Floats, tn: Floats) -> dict[str, Floats]:
    """`DECISION_METRICS` [b] from the numbers of true and false positives and negatives [b]."""
    recall, specificity = tp / (tp + fn), tn / (tn + fp)
    return {
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": np.where(tp + fp > 0, tp / (tp + fp), 0.0),
        "recall": recall,
        "specificity": specificity,
        "f1": np.where(tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn), 0.0),
    }


def ranking_metrics(positive: npt.NDArray[np.bool_], probabilities: Floats, weights: Floats) -> dict[str, Floats]:
    """ROC-AUC (trapezoidal rule) and average precision, over the distinct probabilities in descending order."""
    order = np.argsort(-probabilities, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(probabilities[order]) != 0])
    tp = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    fp = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    positives, negatives = tp.sum(1), fp.sum(1)
    found = tp.cumsum(1)
    area = (fp * (found - tp / 2)).sum(1) / (positives * negatives)
    flagged = found + fp.cumsum(1)
    precision = np.divide(found, flagged, out=np.zeros_like(found), where=flagged > 0)
    return {"roc_auc": area, "pr_auc": (tp * precision).sum(1) / positives}


def _ece(weights: Floats, labels: Ints, probabilities: Floats, bins: int) -> Floats:
    """|sum of (label - probability)| in each bin, summed over bins and divided by the total weight."""
    index = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    gap = weights @ ((labels - probabilities)[:, None] * (index[:, None] == np.arange(bins)))
    total: Floats = np.abs(gap).sum(1) / weights.sum(1)
    return total
