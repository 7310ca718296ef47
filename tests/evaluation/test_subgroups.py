"""How often decisions are right in parts of a split."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from cxr.evaluation.subgroups import by_subtype

ROWS = st.lists(
    st.tuples(
        st.sampled_from(["virus", "bacteria", "normal"]), st.integers(0, 4), st.integers(0, 1), st.integers(0, 1)
    ),
    min_size=1,
    max_size=30,
)


@given(ROWS)
def test_parts_add_up_and_intervals_are_shares_of_several_groups(rows: list[tuple[str, int, int, int]]) -> None:
    table = pd.DataFrame(rows, columns=["subtype", "group", "label", "decision"]).astype({"group": str})
    parts = by_subtype(table, resamples=50)
    assert sum(part.images for part in parts) == len(table)
    right = sum(round(part.right[0] * part.images) for part in parts)
    assert right == int((table["label"] == table["decision"]).sum())
    for part in parts:
        value, low, high = part.right
        assert 0 <= value <= 1
        assert np.isnan([low, high]).all() or (part.groups > 1 and 0 <= low <= high <= 1)
    assert [part.images for part in parts] == sorted((part.images for part in parts), reverse=True)
