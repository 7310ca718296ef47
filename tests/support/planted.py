"""Synthetic images with planted evidence, for tests of Grad-CAM."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cxr.data.decode import UInt8

SIDE, SQUARE = 128, 40


Bools = npt.NDArray[np.bool_]


def planted(seed: int, count: int) -> tuple[UInt8, npt.NDArray[np.int64], Bools]:
    """(noise images, every other one with a bright square; labels, 1 with a square; masks of the squares)."""
    random = np.random.default_rng(seed)
    images = random.integers(60, 120, (count, SIDE, SIDE), np.uint8)
    labels, inside = np.arange(count) % 2, np.zeros(images.shape, bool)
    for image in np.flatnonzero(labels):
        top, left = random.integers(0, SIDE - SQUARE, 2)
        inside[image, top : top + SQUARE, left : left + SQUARE] = True
    images[inside] = 230
    return images, labels, inside
