"""The numbers are those of NumPy's generator, bit for bit: recipes are versioned, and results exist."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cxr.data.philox import uniform

WORD = st.integers(0, 2**64 - 1)


@given(WORD, st.lists(WORD, max_size=5), WORD, st.integers(1, 13))
def test_streams_are_those_of_numpy(seed: int, keys: list[int], stream: int, count: int) -> None:
    found = uniform(seed, np.array(keys, np.uint64), stream, count)
    assert found.shape == (len(keys), count)
    for row, key in zip(found, keys, strict=True):
        own = np.random.Philox(key=np.array([seed, key], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
        assert row.tobytes() == np.random.Generator(own).random(count).tobytes()
