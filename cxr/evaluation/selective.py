"""Leaving out what is least certain: certainty, the limit below which a prediction abstains, risk and coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logit

from cxr.evaluation.metrics import Floats, Ints, group_weights

COVERAGES = np.linspace(0.05, 1.0, 20)
_EDGE = 1e-12


def certainty(probabilities: Floats, threshold: float) -> Floats:
    """The distance [n] of probabilities [n] from the threshold, on the logit scale, as calibration is linear there."""
    clipped = np.clip(np.append(probabilities, threshold), _EDGE, 1 - _EDGE)
    scores = logit(clipped)
    return np.asarray(np.abs(scores[:-1] - scores[-1]))


def certainty_of(probabilities: Floats, threshold: float) -> Floats:
    """The certainty [n] of probabilities [n, k]: of two classes, the distance of the second from the threshold; of
    more, the logarithm of how much more probable the first is than the runner-up (for two, the same at one half)."""
    if probabilities.shape[1] == 2:
        return certainty(probabilities[:, 1], threshold)
    top = np.sort(np.log(np.clip(probabilities, _EDGE, 1.0)), axis=1)
    return np.asarray(top[:, -1] - top[:, -2])


def certainty_limit(certainties: Floats, fraction: float) -> float:
    """The certainty below which this fraction of validation lies: less certain predictions abstain; 0 for none."""
    return float(np.quantile(certainties, fraction)) if fraction else 0.0


def estimated_accuracy(correct: Ints, val: Floats, certainties: Floats, weights: tuple[Floats, Floats]) -> Floats:
    """The accuracy [b] to be expected on unlabelled images with these certainties [m].

    Average-thresholded confidence (Garg et al. 2022, "Leveraging unlabeled data to predict out-of-distribution
    performance"): the share of images above the certainty below which lies as much of validation as is wrong there.
    `correct` [n] and certainties `val` [n] are those of validation; the weightings are [b, n] of validation and [b, m]
    of the images. An estimate: it holds as far as the model is wrong on these images where it is uncertain.
    """
    order = np.argsort(val, kind="stable")
    below = weights[0][:, order].cumsum(1) / weights[0].sum(1, keepdims=True)
    wrong = (weights[0] * (1 - correct)).sum(1) / weights[0].sum(1)
    first = [int(np.searchsorted(row, share + 1e-9)) for row, share in zip(below, wrong, strict=True)]
    limits = np.append(val[order], np.inf)[first]
    above = (certainties >= limits[:, None]) | (wrong == 0)[:, None]
    return np.asarray((weights[1] * above).sum(1) / weights[1].sum(1))


@dataclass(frozen=True, slots=True)
class SelectiveAccuracy:
    """The accuracy [c] of the most certain share `COVERAGES` [c] of images, with its 95% interval; NaN for none."""

    accuracy: Floats
    low: Floats
    high: Floats


def selective_accuracy(correct: Ints, certainties: Floats, groups: Sequence[str], resamples: int) -> SelectiveAccuracy:
    """From decisions (`correct` [n]: 1 if right) and their certainties [n], resampling groups (patients)."""
    whole = accuracy_at_coverage(correct, certainties, np.ones((1, len(correct))))[0]
    if not resamples:
        return SelectiveAccuracy(whole, *(np.full(len(COVERAGES), np.nan) for _ in range(2)))
    draws = accuracy_at_coverage(correct, certainties, group_weights(groups, resamples))
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return SelectiveAccuracy(whole, low, high)


def accuracy_at_coverage(correct: Ints, certainties: Floats, weights: Floats) -> Floats:
    """Accuracy [b, c] of the most certain share `COVERAGES` [c] of images, for each of the weightings [b, n].

    `correct` [n] is 1 for right decisions. The selective accuracy of El-Yaniv and Wiener (2010), one less the selective
    risk; images of equal certainty are taken in the given order.
    """
    order = np.argsort(-certainties, kind="stable")
    kept = weights[:, order].cumsum(1)
    right = (weights[:, order] * correct[order]).cumsum(1)
    found = np.empty((len(weights), len(COVERAGES)))
    for row, (total, good) in enumerate(zip(kept, right, strict=True)):
        last = np.minimum(np.searchsorted(total, COVERAGES * total[-1] - 1e-9), len(total) - 1)
        found[row] = good[last] / total[last]
    return found
