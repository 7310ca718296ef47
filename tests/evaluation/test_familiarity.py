from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.evaluation.familiarity import NEIGHBOURS, Familiarity


def cloud(seed: int, count: int, centre: float = 1.0) -> np.ndarray:
    """Features about one direction."""
    rng = np.random.default_rng(seed)
    return (np.eye(16)[0] * centre + rng.normal(0, 0.2, (count, 16))).astype(np.float32)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(NEIGHBOURS, 60), st.integers(3, 60))
def test_validation_images_have_the_percentiles_of_their_rank(seed: int, train: int, val: int) -> None:
    own = cloud(seed + 1, val)
    found = Familiarity.fit(cloud(seed, train), own).percentiles(own)
    assert found.min() > 0
    assert found.max() <= 100
    np.testing.assert_allclose(np.sort(found), 100 * np.arange(1, val + 1) / val, atol=1e-9)


def test_what_lies_in_another_direction_is_unfamiliar_and_the_length_does_not_matter() -> None:
    familiarity = Familiarity.fit(cloud(0, 200), cloud(1, 100))
    assert familiarity.percentiles(-cloud(2, 20)).max() == 0
    alike = cloud(3, 20)
    np.testing.assert_allclose(familiarity.percentiles(7 * alike), familiarity.percentiles(alike), atol=1.1)
    assert familiarity.percentiles(cloud(3, 400)).mean() == pytest.approx(50, abs=8)


def test_a_training_image_is_more_familiar_than_a_new_one() -> None:
    train = cloud(0, 100)
    familiarity = Familiarity.fit(train, cloud(1, 100))
    assert familiarity.distances(train).mean() < familiarity.distances(cloud(2, 100)).mean()


def test_few_training_images_are_enough() -> None:
    assert np.isfinite(Familiarity.fit(cloud(0, 2), cloud(1, 3)).percentiles(cloud(2, 4))).all()
