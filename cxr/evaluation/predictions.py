"""The table of predictions, from which every metric can be recomputed, and what it holds as arrays.

With two classes its columns `uncalibrated` and `probability` are of the positive one, which is decided at or above a
threshold. With more there are `probability_NAME` for each, `probability` is that of the most probable class, which is
the decision, and `uncalibrated` the same without calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr.evaluation.calibration import IDENTITY, Calibration
from cxr.evaluation.metrics import (
    Floats,
    Ints,
    decision_metrics,
    group_weights,
    intervals,
    percentile_bounds,
    point_metrics,
    weighted_decisions,
    weighted_metrics,
)
from cxr.evaluation.multiclass import multiclass_metrics, weighted_multiclass
from cxr.task import KAGGLE, Task

HALF = 0.5
_LOGIT = "logit_"


def predictions_table(
    images: pd.DataFrame,
    logits: npt.NDArray[np.floating],
    threshold: float = HALF,
    calibration: Calibration = IDENTITY,
    task: Task = KAGGLE,
) -> pd.DataFrame:
    """One row per image, from which every metric can be recomputed.

    `images` has path, digest, group, subtype, label of the n images; `logits` is [n, k] in the same order.
    """
    table = images[["path", "digest", "group", "subtype", "label"]].reset_index(drop=True)
    names, exact = task.slugs, logits.astype(np.float64)
    for index, name in enumerate(names):
        table[f"{_LOGIT}{name}"] = exact[:, index]
    before, after = (each.probabilities(exact) for each in (IDENTITY, calibration))
    if task.binary:
        table["uncalibrated"], table["probability"] = before[:, 1], after[:, 1]
    else:
        table["uncalibrated"], table["probability"] = before.max(1), after.max(1)
        for index, name in enumerate(names):
            table[f"probability_{name}"] = after[:, index]
    return table.assign(decision=decided(after, threshold))


def decided(probabilities: Floats, threshold: float = HALF) -> Ints:
    """The label [n] decided by probabilities [n, k]: of two classes the second at or above the threshold, of more the
    most probable."""
    if probabilities.shape[1] == 2:
        return np.asarray(probabilities[:, 1] >= threshold, np.int64)
    return np.asarray(probabilities.argmax(1), np.int64)


def classes_in(table: pd.DataFrame) -> list[str]:
    """The classes of a predictions table, in order, as `Task.slugs` has them."""
    return [name.removeprefix(_LOGIT) for name in table.columns if name.startswith(_LOGIT)]


def logits_of(table: pd.DataFrame) -> Floats:
    """The logits [n, k]."""
    return table[[f"{_LOGIT}{name}" for name in classes_in(table)]].to_numpy(np.float64)


def is_binary(table: pd.DataFrame) -> bool:
    """Whether a predictions table has two classes."""
    return not any(name.startswith("probability_") for name in table.columns)


def arrays_of(table: pd.DataFrame, column: str = "probability") -> tuple[Ints, Floats]:
    """(true classes [n], probabilities of the positive class [n]) of a predictions table of two classes."""
    return table["label"].to_numpy(np.int64), table[column].to_numpy(np.float64)


def matrix_of(table: pd.DataFrame) -> Floats:
    """The calibrated probabilities [n, k]."""
    if is_binary(table):
        positive = table["probability"].to_numpy(np.float64)
        return np.stack([1 - positive, positive], 1)
    return table[[f"probability_{name}" for name in classes_in(table)]].to_numpy(np.float64)


def points_of(table: pd.DataFrame) -> dict[str, float]:
    """Every metric of a predictions table, at one half for two classes."""
    if is_binary(table):
        return point_metrics(*arrays_of(table), HALF)
    return multiclass_metrics(table["label"].to_numpy(np.int64), matrix_of(table), classes_in(table))


def chosen_points_of(table: pd.DataFrame, threshold: float) -> dict[str, float]:
    """The metrics at the threshold chosen on validation; none for more than two classes, where none is chosen."""
    return decision_metrics(*arrays_of(table), threshold) if is_binary(table) else {}


def draws_of(table: pd.DataFrame, weights: Floats) -> dict[str, Floats]:
    """`points_of` [b] for each of the weightings [b, n]."""
    if is_binary(table):
        return weighted_metrics(*arrays_of(table), weights, HALF)
    return weighted_multiclass(table["label"].to_numpy(np.int64), matrix_of(table), weights, classes_in(table))


def chosen_draws_of(table: pd.DataFrame, weights: Floats, threshold: float) -> dict[str, Floats]:
    """`chosen_points_of` [b] for each of the weightings [b, n]."""
    return weighted_decisions(*arrays_of(table), weights, threshold) if is_binary(table) else {}


def bounds_of(table: pd.DataFrame, resamples: int) -> dict[str, tuple[float, float]]:
    """The 95% interval of each of `points_of`, by resampling groups."""
    groups = list(table["group"])
    if is_binary(table):
        return intervals(*arrays_of(table), groups, resamples, partial(weighted_metrics, threshold=HALF))
    draws = draws_of(table, group_weights(groups, resamples))
    return percentile_bounds(draws, _trials(table, groups), len(set(groups)))


def _trials(table: pd.DataFrame, groups: Sequence[str]) -> dict[str, int]:
    """The groups of each class, and all of them, for the exact intervals of recall and accuracy."""
    own = table.groupby("label")["group"].nunique()
    return {f"recall_of_{name}": int(own.get(c, 0)) for c, name in enumerate(classes_in(table))} | {
        "accuracy": len(set(groups))
    }


def chosen_bounds_of(table: pd.DataFrame, resamples: int, threshold: float) -> dict[str, tuple[float, float]]:
    """The 95% interval of each of `chosen_points_of`."""
    if not is_binary(table):
        return {}
    measure = partial(weighted_decisions, threshold=threshold)
    return intervals(*arrays_of(table), list(table["group"]), resamples, measure)
