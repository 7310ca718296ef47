"""How like the training images an image is, by what the network makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

from cxr.evaluation.metrics import Floats

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class Familiarity:
    """Features of training images, the `bank` [m, d], and the distances of the validation images, `reference` [v].

    The distance of an image is the mean cosine distance of its features to the `NEIGHBOURS` nearest of the bank (Sun et
    al. 2022, "Out-of-Distribution Detection with Deep Nearest Neighbors").
    """

    bank: Float16
    reference: Float32
    _index: NearestNeighbors = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(self.bank)), metric="cosine", algorithm="brute")
        object.__setattr__(self, "_index", index.fit(self.bank.astype(np.float64)))

    @classmethod
    def fit(cls, train: Float32, val: Float32) -> Self:
        """From features of training images [m, d] and of validation images [v, d]."""
        bank = (train / np.linalg.norm(train, axis=1, keepdims=True)).astype(np.float16)
        reference = cls(bank, np.empty(0, np.float32)).distances(val)
        return cls(bank, np.sort(reference).astype(np.float32))

    def distances(self, features: Float32) -> Floats:
        """Of features [n, d] from the training images [n]."""
        return np.asarray(self._index.kneighbors(features.astype(np.float64))[0].mean(1))

    def percentiles(self, features: Float32) -> Floats:
        """The familiarity [n] of features [n, d]: the percentage of validation images that are at most as familiar."""
        beyond = np.searchsorted(self.reference, self.distances(features).astype(np.float32), side="left")
        return np.asarray(100.0 * (len(self.reference) - beyond) / len(self.reference))
