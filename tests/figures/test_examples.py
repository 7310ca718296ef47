"""Selection of examples and their panel."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from planted import planted
from torchvision.models import ResNet

from cxr.figures import examples

scores = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 1)  # ties, too


scored = st.lists(st.tuples(st.sampled_from([0, 1]), scores), max_size=30)


thresholds = st.sampled_from([0.0, 0.5, 0.9, 1.0]) | st.floats(0, 1)


def predictions(rows: list[tuple[int, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["label", "probability"]).astype({"label": int, "probability": float})
    return table.assign(path=[f"image{i:02}" for i in range(len(rows))])


@given(scored, thresholds, st.integers(0, 5))
def test_examples_are_the_most_confident_and_the_nearest(
    rows: list[tuple[int, float]], threshold: float, count: int
) -> None:
    table = predictions(rows)
    chosen = examples.choose_examples(table, threshold, count)
    assert chosen.index.is_unique
    pd.testing.assert_frame_equal(chosen[list(table)], table.loc[chosen.index])
    called = table["probability"] >= threshold
    confidence = table["probability"].where(called, 1 - table["probability"])
    correct = called == (table["label"] == 1)
    right, wrong, near = (
        chosen[chosen["kind"] == kind].index for kind in (examples.RIGHT, examples.WRONG, examples.BORDERLINE)
    )
    assert [*right, *wrong, *near] == list(chosen.index)
    assert len(right) == min(count, correct.sum())
    assert len(wrong) == min(count, (~correct).sum())
    assert len(near) == min(count, len(table) - len(right) - len(wrong))
    assert correct[right].all()
    assert not correct[wrong].any()
    for picked, pool in ((wrong, ~correct), *((right[called[right] == c], correct & (called == c)) for c in (0, 1))):
        left = confidence[pool].drop(picked)
        assert picked.empty or left.empty or confidence[picked].min() >= left.max()
    distance = (table["probability"] - threshold).abs()
    farther = distance.drop(chosen.index)
    assert near.empty or farther.empty or distance[near].max() <= farther.min()
    if count >= 2:
        assert set(table.loc[right, "label"]) == set(table.loc[correct, "label"])


@given(scored, thresholds, st.randoms(use_true_random=False))
def test_examples_do_not_depend_on_the_order_of_the_rows(
    rows: list[tuple[int, float]], threshold: float, random: np.random.Generator
) -> None:
    table = predictions(rows)
    order = list(table.index)
    random.shuffle(order)
    pd.testing.assert_frame_equal(
        examples.choose_examples(table.loc[order], threshold), examples.choose_examples(table, threshold)
    )


def test_a_duplicate_image_is_chosen_once() -> None:
    table = predictions([(1, 0.9), (1, 0.9), (0, 0.2)]).assign(digest=["a", "a", "b"])
    assert list(examples.choose_examples(table, 0.5)["path"]) == ["image00", "image02"]


def test_confidence_is_that_of_the_decision_when_the_threshold_is_high() -> None:
    table = predictions([(1, 0.9), (1, 0.5), (0, 0.99), (0, 0.96)])  # all wrong at 0.95
    wrong = examples.choose_examples(table, 0.95, 2)
    assert list(wrong["path"][:2]) == ["image02", "image03"]


def test_the_panel_names_kind_truth_and_probability(finder: ResNet) -> None:
    images = planted(7, 4)[0]
    chosen = examples.choose_examples(predictions([(0, 0.125), (1, 0.75), (0, 0.875), (1, 0.25)]), 0.5)
    figure = examples.examples_panel(finder, images[chosen.index], chosen, "test")
    shown = {axes.get_title().replace("\n", " ").replace("\xa0", " ") for axes in figure.axes if axes.images}
    assert shown == {
        "confident right: NORMAL, p = 0.125",
        "confident right: PNEUMONIA, p = 0.750",
        "confident wrong: NORMAL, p = 0.875",
        "confident wrong: PNEUMONIA, p = 0.250",
    }
