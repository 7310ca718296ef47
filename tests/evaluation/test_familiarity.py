"""Familiarity: percentiles of the distance to the training images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.evaluation.familiarity import Familiarity


def cloud(seed: int, count: int, centre: float = 1.0) -> np.ndarray:
    """Features about one direction."""
    rng = np.random.default_rng(seed)
    return (np.eye(16)[0] * centre + rng.normal(0, 0.2, (count, 16))).astype(np.float32)


def two_classes(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features about two opposite directions, and their labels."""
    return np.concatenate([cloud(seed, count), cloud(seed + 1, count, -1.0)]), np.repeat([0, 1], count)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(3, 60), st.integers(3, 60))
def test_validation_images_have_the_percentiles_of_their_rank(seed: int, train: int, val: int) -> None:
    own = cloud(seed + 1, val)
    found = Familiarity.fit(*two_classes(seed, train), own).percentiles(own)
    assert found.min() > 0
    assert found.max() <= 100
    np.testing.assert_allclose(np.sort(found), 100 * np.arange(1, val + 1) / val, atol=1e-9)


def test_what_lies_off_both_classes_is_unfamiliar() -> None:
    familiarity = Familiarity.fit(*two_classes(0, 200), two_classes(5, 100)[0])
    sideways = np.roll(cloud(2, 20), 1, axis=1)
    assert familiarity.percentiles(sideways).max() == 0
    for label in (1.0, -1.0):
        assert familiarity.percentiles(cloud(3, 400, label)).mean() == pytest.approx(50, abs=8)


def test_the_distance_counts_in_units_of_the_spread() -> None:
    narrow = np.concatenate([cloud(0, 200)[:, :1], cloud(1, 200)[:, 1:2] * 0.01], axis=1)
    familiarity = Familiarity.fit(narrow, np.zeros(200, np.int64), narrow)
    wide, thin = familiarity.distances(familiarity.means + np.float32([[0.2, 0.0], [0.0, 0.2]]))
    assert thin > 20 * wide


def test_few_training_images_are_enough() -> None:
    found = Familiarity.fit(cloud(0, 2), np.array([0, 1]), cloud(1, 3)).percentiles(cloud(2, 4))
    assert np.isfinite(found).all()
