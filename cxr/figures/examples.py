"""Selection of example images for Grad-CAM, and the panel that shows them."""

from __future__ import annotations

from collections.abc import Hashable

import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from cxr.data.decode import UInt8
from cxr.figures.single import explanation_panel
from cxr.network.gradcam import POSITIVE, heatmaps
from cxr.task import KAGGLE, Task

RIGHT, WRONG, BORDERLINE = "confident right", "confident wrong", "borderline"


def choose_examples(table: pd.DataFrame, threshold: float | None, count: int = 4) -> pd.DataFrame:
    """Up to `count` rows of each `kind`: confident right, confident wrong, borderline; in this order, no image twice.

    `table` has the columns path, label (0, 1) and probability (of pneumonia), and a unique index, which is kept. Of
    rows with the same digest (if there is that column) only the first by path is used. Confidence is the probability of
    the decided class; half of the right ones are of either class, if available. Borderline are those of the rest that
    are nearest to the threshold; without one (more than two classes) those of lowest probability. The result does not
    depend on the order of the rows.
    """
    table = table.sort_values("path").drop_duplicates("digest" if "digest" in table else "path")
    confidence, distance, correct = _judged(table, threshold)
    table = table.loc[confidence.sort_values(ascending=False, kind="stable").index]
    correct = correct[table.index]
    right = _of_every_class(table[correct], count)
    wrong = list(table[~correct].index[:count])
    distance = distance[table.index].drop([*right, *wrong])
    nearest = list(distance.sort_values(kind="stable").index[:count])
    kinds = [RIGHT] * len(right) + [WRONG] * len(wrong) + [BORDERLINE] * len(nearest)
    return table.loc[[*right, *wrong, *nearest]].assign(kind=kinds)


def _judged(table: pd.DataFrame, threshold: float | None) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Of each row: the probability of the decided class, the distance from the decision, and whether it is right."""
    probability = table["probability"]
    if threshold is None:
        return probability, probability, table["decision"] == table["label"]
    predicted = probability >= threshold
    confidence = probability.where(predicted, 1 - probability)
    return confidence, (probability - threshold).abs(), predicted == (table["label"] == 1)


def _of_every_class(table: pd.DataFrame, count: int) -> list[Hashable]:
    """The index of `count` rows: the first of each class in equal parts, filled up with the next rows."""
    halves = table.groupby("label").head(count // max(2, table["label"].nunique())).index
    return [*halves, *table.index.drop(halves)][:count]


def examples_panel(model: nn.Module, images: UInt8, chosen: pd.DataFrame, title: str, task: Task = KAGGLE) -> Figure:
    """A figure of the images [n, s, s] with their Grad-CAM heat maps; `chosen` are the n rows from
    `choose_examples`."""
    rows = zip(chosen["kind"], chosen["label"], chosen["probability"], strict=True)
    captions = [f"{kind}: {_unbroken(f'{task.classes[label]}, p = {p:.3f}')}" for kind, label, p in rows]
    heading = f"{title}; true class and probability p of {task.positive or 'the decided class'}"
    targets = POSITIVE if task.binary else list(chosen["decision"])
    return explanation_panel(images, heatmaps(model, images, targets), captions, heading)


def _unbroken(text: str) -> str:
    """Text in which captions are not wrapped."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")
