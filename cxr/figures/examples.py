"""Which images to show with Grad-CAM, and the panel that shows them."""

from __future__ import annotations

from collections.abc import Hashable

import pandas as pd
from matplotlib.figure import Figure
from torchvision.models import ResNet

from cxr.data.decode import UInt8
from cxr.data.splits import CLASSES
from cxr.figures.single import explanation_panel
from cxr.network.gradcam import heatmaps

RIGHT, WRONG, BORDERLINE = "confident right", "confident wrong", "borderline"


def choose_examples(table: pd.DataFrame, threshold: float, count: int = 4) -> pd.DataFrame:
    """Up to `count` rows of each `kind`: confident right, confident wrong, borderline; in this order, no image twice.

    `table` has the columns path, label (0, 1) and probability (of pneumonia), and an index without repeats; rows keep
    theirs. Of rows with the same digest, where there is that column, only the first path's is taken. Confidence is
    the probability of what was decided; half of the right ones are of either class, as far as there are any.
    Borderline are those nearest to the threshold among the rest. The order of the table's rows does not matter.
    """
    table = table.sort_values("path").drop_duplicates("digest" if "digest" in table else "path")
    called = table["probability"] >= threshold
    confidence = table["probability"].where(called, 1 - table["probability"])
    table = table.loc[confidence.sort_values(ascending=False, kind="stable").index]
    correct = called[table.index] == (table["label"] == 1)
    right = _of_both_classes(table[correct], count)
    wrong = list(table[~correct].index[:count])
    distance = (table["probability"] - threshold).abs().drop([*right, *wrong])
    nearest = list(distance.sort_values(kind="stable").index[:count])
    kinds = [RIGHT] * len(right) + [WRONG] * len(wrong) + [BORDERLINE] * len(nearest)
    return table.loc[[*right, *wrong, *nearest]].assign(kind=kinds)


def _of_both_classes(table: pd.DataFrame, count: int) -> list[Hashable]:
    """The index of `count` rows, the first of either class in equal parts, and filled up by whatever comes next."""
    halves = table.groupby("label").head(count // 2).index
    return [*halves, *table.index.drop(halves)][:count]


def examples_panel(model: ResNet, images: UInt8, chosen: pd.DataFrame, title: str) -> Figure:
    """One figure that explains the images [n, s, s] of the n rows that `choose_examples` chose, in their order."""
    rows = zip(chosen["kind"], chosen["label"], chosen["probability"], strict=True)
    captions = [f"{kind}: {_unbroken(f'{CLASSES[label]}, p = {p:.3f}')}" for kind, label, p in rows]
    heading = f"{title}; true class and probability p of pneumonia"
    return explanation_panel(images, heatmaps(model, images), captions, heading)


def _unbroken(text: str) -> str:
    """Text that captions are not broken within."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")
