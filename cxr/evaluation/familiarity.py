"""How like the training images an image is, by its features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from sklearn.covariance import LedoitWolf

from cxr.evaluation.metrics import Floats, Ints

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Familiarity:
    """The `means` [k, d] of the training images' features in each class, the inverse of their common covariance,
    `precision` [d, d], and the sorted distances of the validation images, `reference` [v].

    The distance of an image is the squared Mahalanobis distance to the nearest mean (Lee et al. 2018, "A Simple Unified
    Framework for Detecting Out-of-Distribution Samples"), with the covariance shrunk by scikit-learn's `LedoitWolf`.
    """

    means: Float32
    precision: Float32
    reference: Float32

    @classmethod
    def fit(cls, train: Float32, labels: Ints, val: Float32) -> Self:
        """From features of training images [m, d], their labels [m], and features of validation images [v, d]."""
        means = np.stack([train[labels == label].mean(0) for label in np.unique(labels)])
        residuals = train - means[np.searchsorted(np.unique(labels), labels)]
        precision = LedoitWolf(assume_centered=True).fit(residuals.astype(np.float64)).precision_.astype(np.float32)
        reference = cls(means, precision, np.empty(0, np.float32)).distances(val)
        return cls(means, precision, np.sort(reference).astype(np.float32))

    def distances(self, features: Float32) -> Floats:
        """Of features [n, d] from the training images [n]."""
        precision, found = self.precision.astype(np.float64), []
        for mean in self.means:
            gaps = features.astype(np.float64) - mean
            found.append(((gaps @ precision) * gaps).sum(1))
        return np.asarray(np.min(found, axis=0))

    def percentiles(self, features: Float32) -> Floats:
        """The familiarity [n] of features [n, d]: the percentage of validation images that are at most as familiar."""
        beyond = np.searchsorted(self.reference, self.distances(features).astype(np.float32), side="left")
        return np.asarray(100.0 * (len(self.reference) - beyond) / len(self.reference))
