"""From logits to the figures of one split: predictions table -> metrics with intervals -> report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from cxr.data.index import CLASSES
from cxr.metrics import (
    Floats,
    Interval,
    Ints,
    classification_report,
    confusion,
    intervals,
    point_metrics,
    recall_by_subtype,
)


def predictions_table(images: pd.DataFrame, logits: npt.NDArray[np.float32], threshold: float = 0.5) -> pd.DataFrame:
    """One row for each image, from which every figure can be computed again.

    `images` holds path, digest, group, subtype, label of the n images, `logits` is [n, 2] in the same order.
    Added: logit_normal, logit_pneumonia, probability (of pneumonia, softmax), decision at `threshold`.
    """
    table = images[["path", "digest", "group", "subtype", "label"]].reset_index(drop=True)
    exact = logits.astype(np.float64)
    table["logit_normal"], table["logit_pneumonia"] = exact[:, 0], exact[:, 1]
    table["probability"] = torch.softmax(torch.from_numpy(exact), 1)[:, 1].numpy()
    table["decision"] = (table["probability"] >= threshold).astype(int)
    return table


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one split at one threshold. `values` are the metrics, `bounds` their 95% intervals."""

    split: str
    threshold: float
    table: pd.DataFrame
    values: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    subtypes: dict[str, float]

    @property
    def labels(self) -> Ints:
        """The true classes [n]."""
        return self.table["label"].to_numpy(np.int64)

    @property
    def probabilities(self) -> Floats:
        """The probabilities of pneumonia [n]."""
        return self.table["probability"].to_numpy(np.float64)

    def counts(self) -> Ints:
        """The confusion matrix [2, 2]."""
        return confusion(self.labels, self.probabilities, self.threshold)

    def interval(self, name: str) -> Interval:
        """(value, low, high) of a metric."""
        return (self.values[name], *self.bounds[name])

    def figures(self) -> dict[str, float]:
        """What is logged: `test_recall`, and, where there are intervals, `test_recall_low`, `test_recall_high`."""
        named = {f"{self.split}_{name}": value for name, value in self.values.items()}
        for name, (low, high) in self.bounds.items():
            if np.isfinite(low):
                named |= {f"{self.split}_{name}_low": low, f"{self.split}_{name}_high": high}
        return named | {f"{self.split}_recall_{name}": value for name, value in self.subtypes.items()}

    def text(self) -> str:
        """The classification report with the metrics and their intervals below it."""
        lines = [
            f"{self.split}: {len(self.table)} images of {self.table['group'].nunique()} groups, "
            f"threshold {self.threshold:g}",
            "",
            classification_report(self.labels, self.probabilities, CLASSES, self.threshold),
        ]
        lines += [f"{name:18} {format_interval(self.interval(name))}" for name in self.values]
        lines += [f"{'recall ' + name:18} {value:.4f}" for name, value in self.subtypes.items()]
        return "\n".join(lines) + "\n"


def format_interval(interval: Interval) -> str:
    """`0.8700 [0.8421, 0.8958]`; the value alone when there is no interval."""
    value, low, high = interval
    return f"{value:.4f} [{low:.4f}, {high:.4f}]" if np.isfinite(low) else f"{value:.4f}"


def evaluate(table: pd.DataFrame, split: str, threshold: float, resamples: int) -> Report:
    """The report of a predictions table. `resamples` of whole groups stand behind each interval; 0 for none."""
    labels = table["label"].to_numpy(np.int64)
    probabilities = table["probability"].to_numpy(np.float64)
    return Report(
        split=split,
        threshold=threshold,
        table=table,
        values=point_metrics(labels, probabilities, threshold),
        bounds=intervals(labels, probabilities, list(table["group"]), threshold, resamples),
        subtypes=recall_by_subtype(labels, probabilities, table["subtype"], threshold),
    )
