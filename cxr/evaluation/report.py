"""From logits to the report of one split: calibrated predictions -> metrics with intervals -> report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cxr.evaluation.calibration import IDENTITY, Calibration, CalibrationMethod, correct_prior, estimate_prior
from cxr.evaluation.metrics import (
    Floats,
    Interval,
    Ints,
    classification_report,
    confusion,
    counts_of,
    group_weights,
    percentile_bounds,
    point_metrics,
    recall_by_subtype,
)
from cxr.evaluation.multiclass import multiclass_metrics, multiclass_report
from cxr.evaluation.predictions import (
    HALF,
    arrays_of,
    bounds_of,
    chosen_bounds_of,
    chosen_points_of,
    classes_in,
    is_binary,
    logits_of,
    matrix_of,
    points_of,
)
from cxr.evaluation.selective import certainty_of
from cxr.task import KAGGLE, Task, slug
from cxr.threshold_rule import RuleKind, ThresholdRule

SUBTYPE_NAMES = ("bacteria", "virus", "unknown", "normal")  # as file names of the Kaggle set tell them
UNFAMILIAR = 5.0  # the percentage of validation images that would be called unfamiliar
MAIN = ("roc_auc", "accuracy", "recall", "specificity")  # what models are compared by at first sight
STRESS = "stressed_val_loss_"  # how the names of the losses under each stress begin
CALIBRATED = ("brier", "log_loss", "ece")  # the metrics that calibration can improve


@dataclass(frozen=True, slots=True)
class Report:
    """The metrics of one split.

    `values` are the metrics at threshold 0.5, `bounds` their 95% intervals; `chosen_…` the threshold-dependent metrics
    at `threshold`, with a description of its `origin`; `before` the metrics in `CALIBRATED` without calibration;
    `prior` the effect of a correction for a different prevalence; `selective` what is left of the images where the
    model abstains, and how many are unfamiliar, if the table says so. With more than two classes the most probable one
    decides: there is no threshold, and no `chosen_…`, `subtypes` or `prior`.
    """

    split: str
    threshold: float
    origin: str
    table: pd.DataFrame
    values: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    chosen_values: dict[str, float]
    chosen_bounds: dict[str, tuple[float, float]]
    subtypes: dict[str, float]
    before: dict[str, float]
    prior: dict[str, float]
    selective: dict[str, float] = field(default_factory=dict)
    task: Task = KAGGLE

    def about(self, task: Task) -> Report:
        """The same report, with the names of these classes."""
        return replace(self, task=task)

    @property
    def binary(self) -> bool:
        """Whether there are two classes."""
        return is_binary(self.table)

    @property
    def labels(self) -> Ints:
        """The true classes [n]."""
        return arrays_of(self.table)[0]

    @property
    def probabilities(self) -> Floats:
        """The calibrated probabilities [n] of the positive class, or of the decided one of more than two."""
        return arrays_of(self.table)[1]

    @property
    def uncalibrated(self) -> Floats:
        """The probabilities [n] without calibration."""
        return arrays_of(self.table, "uncalibrated")[1]

    @property
    def correct(self) -> Ints:
        """Whether each decision of the model is right [n]."""
        return np.asarray(self.table["decision"] == self.table["label"], np.int64)

    def counts(self, threshold: float = HALF) -> Ints:
        """The confusion matrix [k, k]: rows are the true class, columns the decision."""
        if self.binary:
            return confusion(self.labels, self.probabilities, threshold)
        return counts_of(self.labels, self.table["decision"].to_numpy(np.int64), len(classes_in(self.table)))

    def interval(self, name: str) -> Interval:
        """(value, low, high) of a metric at 0.5."""
        return (self.values[name], *self.bounds[name])

    def chosen_interval(self, name: str) -> Interval:
        """(value, low, high) of a metric at the chosen threshold."""
        return (self.chosen_values[name], *self.chosen_bounds[name])

    def metrics(self) -> dict[str, float]:
        """The metrics under the names that are logged: `test_recall`, `test_recall_low`, `test_recall_high`,
        `test_chosen_recall`, and so on."""
        named = _named(f"{self.split}_", self.values, self.bounds)
        named |= _named(f"{self.split}_chosen_", self.chosen_values, self.chosen_bounds)
        named |= {f"{self.split}_recall_{_subtype_key(name)}": value for name, value in self.subtypes.items()}
        named |= {f"{self.split}_uncalibrated_{name}": value for name, value in self.before.items()}
        named |= {f"{self.split}_{name}": value for name, value in self.selective.items()}
        return named | {f"{self.split}_prior_{name}": value for name, value in self.prior.items()}

    def headline(self) -> dict[str, float]:
        """Those of `metrics` that a chart, a column or a query of runs needs.

        Every metric at 0.5; of a split that nothing was fitted on also the intervals of `MAIN`, the decisions at the
        chosen threshold, the recall of each subtype and class, and what is left of images that are abstained from.
        """
        every, split = self.metrics(), self.split
        names = [name for name in self.values if "_of_" not in name]
        if split != "val":
            names += [f"{name}{end}" for name in MAIN for end in ("_low", "_high")]
            names += [f"chosen_{name}" for name in MAIN[1:]] + [
                f"recall_{_subtype_key(name)}" for name in self.subtypes
            ]
            names += [f"recall_of_{slug}" for slug in self.task.slugs] + ["abstained", "kept_accuracy", "unfamiliar"]
        return {f"{split}_{name}": every[f"{split}_{name}"] for name in names if f"{split}_{name}" in every}

    def text(self) -> str:
        """The classification reports at both thresholds, with the metrics and their intervals."""
        lines = [f"{self.split}: {len(self.table)} images of {self.table['group'].nunique()} groups", ""]
        lines += self._class_lines()
        lines += [f"{name:25} {format_interval(self.interval(name))}" for name in self.values]
        lines += [
            f"{name + ' (chosen)':25} {format_interval(self.chosen_interval(name))}" for name in self.chosen_values
        ]
        lines += [f"{'recall ' + name:25} {value:.4f}" for name, value in self.subtypes.items()]
        lines += [f"{name + ' uncalibrated':25} {value:.4f}" for name, value in self.before.items()]
        lines += [f"{name:25} {value:.4f}" for name, value in self.selective.items()]
        return "\n".join([*lines, *self._prior_lines()]) + "\n"

    def _class_lines(self) -> list[str]:
        """scikit-learn's reports: at both thresholds for two classes."""
        if not self.binary:
            decisions = self.table["decision"].to_numpy(np.int64)
            return ["the most probable class decides", "", multiclass_report(self.labels, decisions, self.task.classes)]
        lines = []
        for threshold, note in ((HALF, ""), (self.threshold, f", {self.origin}")):
            report = classification_report(self.labels, self.probabilities, self.task.classes, threshold)
            lines += [f"threshold {threshold:.4g}{note}", "", report]
        return lines

    def _prior_lines(self) -> list[str]:
        if not self.prior:
            return []
        p = self.prior
        return [
            "",
            f"prevalence of {self.task.positive}: {p['implied']:.3f} assumed by the probabilities, {p['own']:.3f} in "
            f"these images, {p['estimated']:.3f} estimated without labels",
            f"corrected for the prevalence here (unknown in use): accuracy {self.values['accuracy']:.4f} -> "
            f"{p['corrected_accuracy']:.4f}, brier {self.values['brier']:.4f} -> {p['corrected_brier']:.4f}, "
            f"ece {self.values['ece']:.4f} -> {p['corrected_ece']:.4f}",
        ]


def _subtype_key(name: str) -> str:
    """A subtype in the name of a metric: those of the Kaggle set as they are, others unlike any other metric."""
    return name if name in SUBTYPE_NAMES else f"of_subtype_{slug(name)}"


def _named(prefix: str, values: dict[str, float], bounds: dict[str, tuple[float, float]]) -> dict[str, float]:
    named = {f"{prefix}{name}": value for name, value in values.items()}
    for name, (low, high) in bounds.items():
        if np.isfinite(low):
            named |= {f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
    return named


def at_first_sight(metrics: Mapping[str, float], reports: Sequence[Report]) -> dict[str, float]:
    """Those of a run's metrics that are logged as such, the headlines of its reports among them; the others are in a
    table."""
    hidden = {name for report in reports for name in report.metrics().keys() - report.headline().keys()}
    return {name: value for name, value in metrics.items() if name not in hidden and not name.startswith(STRESS)}


def format_interval(interval: Interval) -> str:
    """`0.8700 [0.8421, 0.8958]`; only the value if there is no interval."""
    value, low, high = interval
    return f"{value:.4f} [{low:.4f}, {high:.4f}]" if np.isfinite(low) else f"{value:.4f}"


def interval_words(interval: Interval) -> str:
    """`0.870 (95% interval 0.842 to 0.896)`; only the value if there is no interval."""
    value, low, high = interval
    return f"{value:.3f} (95% interval {low:.3f} to {high:.3f})" if np.isfinite(low) else f"{value:.3f}"


def implied_prevalence(calibration: Calibration, validation: float) -> float:
    """The prevalence of the positive class that the probabilities assume.

    Training weights the classes equally, which implies one half; only the offset of Platt scaling changes that, to the
    prevalence on validation.
    """
    return validation if calibration.method is CalibrationMethod.PLATT else 0.5


def origin_of(rule: ThresholdRule, split: str) -> str:
    """A description of the origin of a threshold that `rule` determined."""
    if rule.kind is RuleKind.FIXED:
        return "fixed"
    return f"chosen by {rule.text} on {'these images' if split == 'val' else 'validation'}"


def evaluate(
    table: pd.DataFrame,
    split: str,
    threshold: float,
    resamples: int,
    prevalence: float | None = None,
    origin: str = "stored with the model",
) -> Report:
    """The report of a predictions table, with `resamples` bootstrap resamples of groups for each interval; 0 for none.

    `threshold` is that of the model, `origin` describes where it comes from; `prevalence` is what the probabilities
    assume (`implied_prevalence`); None omits the effect of a correction for it.
    """
    binary = is_binary(table)
    uncalibrated = points_of_logits(table["label"].to_numpy(np.int64), logits_of(table))
    return Report(
        split=split,
        threshold=threshold,
        origin=origin,
        table=table,
        values=points_of(table),
        bounds=bounds_of(table, resamples),
        chosen_values=chosen_points_of(table, threshold),
        chosen_bounds=chosen_bounds_of(table, resamples, threshold),
        subtypes=recall_by_subtype(*arrays_of(table), table["subtype"], HALF) if binary else {},
        before={name: uncalibrated[name] for name in CALIBRATED},
        prior=_prior(*arrays_of(table), prevalence) if binary and prevalence is not None else {},
        selective=_selective(table, resamples) if "abstain" in table else {},
    )


def with_selection(
    table: pd.DataFrame, threshold: float, limit: float, familiarity: npt.NDArray[np.float64]
) -> pd.DataFrame:
    """A predictions table with the columns `familiarity`, a percentage of validation, and `abstain` (0 or 1)."""
    return table.assign(familiarity=familiarity, abstain=(certainties_of(table, threshold) < limit).astype(int))


def certainties_of(table: pd.DataFrame, threshold: float) -> Floats:
    """How certain each decision [n] of a predictions table is."""
    return certainty_of(matrix_of(table), threshold)


def _selective(table: pd.DataFrame, resamples: int) -> dict[str, float]:
    """How many images are abstained from and unfamiliar, and the accuracy of the decisions on those that are left."""
    kept = table[table["abstain"] == 0]
    found = {
        "abstained": float(table["abstain"].mean()),
        "unfamiliar": float((table["familiarity"] < UNFAMILIAR).mean()),
    }
    if kept["label"].nunique() < 2:
        return found
    correct, groups = (kept["decision"] == kept["label"]).to_numpy(np.float64), list(kept["group"])
    weights = group_weights(groups, resamples)
    draws = {"kept_accuracy": weights @ correct / weights.sum(1)}
    count = len(set(groups))
    bounds = percentile_bounds(draws, {"kept_accuracy": count}, count)
    return found | _named("", {"kept_accuracy": float(correct.mean())}, bounds)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> float:
    """Cross-entropy of logits [n, k] and labels [n], each image weighted by its class: the training loss."""
    return F.cross_entropy(logits, labels, weights.to(logits.dtype)).item()


def stressed_metrics(logits: Tensor, labels: Tensor, weights: Tensor, stresses: Mapping[str, int]) -> dict[str, float]:
    """The metrics of the validation images under perturbations (stresses): overall, and the loss under each.

    logits [n, k] and labels [n], uncalibrated, one stress after the other; class weights [k]; `stresses`: the name of
    each and its number of images, in order.
    """
    metrics, sizes = {"stressed_val_loss": weighted_loss(logits, labels, weights)}, list(stresses.values())
    parts = zip(torch.split(logits, sizes), torch.split(labels, sizes), strict=True)
    for name, (part, part_labels) in zip(stresses, parts, strict=True):
        metrics[f"{STRESS}{name}"] = weighted_loss(part, part_labels, weights)
    points = points_of_logits(labels.numpy(), logits.numpy())
    names = ("accuracy", "recall", "specificity", "roc_auc")
    return metrics | {f"stressed_val_{name}": points[name] for name in names}


def points_of_logits(labels: Ints, logits: npt.NDArray[np.floating]) -> dict[str, float]:
    """Every metric of uncalibrated logits [n, k] and labels [n]."""
    probabilities = IDENTITY.probabilities(logits)
    if logits.shape[1] == 2:
        return point_metrics(labels, probabilities[:, 1])
    return multiclass_metrics(labels, probabilities, [str(index) for index in range(logits.shape[1])])


def _prior(labels: Ints, probabilities: Floats, prevalence: float) -> dict[str, float]:
    own = float(labels.mean())
    corrected = point_metrics(labels, correct_prior(probabilities, prevalence, own))
    return {
        "implied": prevalence,
        "own": own,
        "estimated": estimate_prior(probabilities, prevalence),
        **{f"corrected_{name}": corrected[name] for name in ("accuracy", *CALIBRATED)},
    }
