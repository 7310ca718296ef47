"""Buckets give the pairs that comparing all with all gives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.audit import hamming
from cxr.audit.hamming import HashIndex

Hashes = npt.NDArray[np.uint64]
WORD = st.integers(0, 2**64 - 1)


def all_pairs(queries: Hashes, hashes: Hashes, radius: int) -> list[tuple[int, int]]:
    """By comparing all with all."""
    found = np.nonzero(np.bitwise_count(queries[:, None] ^ hashes) <= radius)
    return list(zip(*(side.tolist() for side in found), strict=True))


def in_buckets(queries: Hashes, hashes: Hashes, radius: int) -> list[tuple[int, int]]:
    found = HashIndex(hashes).within(queries, radius)
    return sorted(pair for a, b in found for pair in zip(a.tolist(), b.tolist(), strict=True))


@st.composite
def crowded(draw: st.DrawFn) -> Hashes:
    """Hashes about a few centres, so that many are near the limit, and some the same."""
    centres = draw(st.lists(WORD, min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = rng.choice(np.array(centres, np.uint64), draw(st.integers(0, 40)))
    flipped = [sum(1 << int(bit) for bit in rng.permutation(64)[: rng.integers(0, 12)]) for _ in chosen]
    return chosen ^ np.array(flipped, np.uint64)


@settings(max_examples=20, deadline=None)
@given(crowded(), st.integers(0, 12), st.integers(1, 3))
def test_buckets_give_each_pair_of_all_pairs_once(hashes: Hashes, radius: int, step: int) -> None:
    queries = hashes[::step]
    assert in_buckets(queries, hashes, radius) == all_pairs(queries, hashes, radius)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_bucket_that_holds_everything_is_searched_in_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(hamming, "_BLOCK", block)
    hashes = np.full(150, 2**63, np.uint64)
    parts = list(HashIndex(hashes).within(hashes[:20], 2))
    assert max(len(a) for a, _ in parts) <= max(block, len(hashes))
    assert sum(len(a) for a, _ in parts) == 20 * 150
