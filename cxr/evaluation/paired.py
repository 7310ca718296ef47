"""Comparison of strategies, or of backbones, on the same test images: intervals, paired differences, stability.

The metric of a strategy is the mean over its seeds. It varies with the patients and with the seeds. The variance over
patients is that of a cluster bootstrap (Field and Welsh 2007) with the same resamples for every run, so that
differences are paired. The variance over seeds is pooled over the strategies, as three seeds of one strategy are too
few (bootstrapping them gives intervals that are far too narrow). Intervals and tests use the sum of both and Student's
t with the degrees of freedom of Satterthwaite (1946). If no strategy has two seeds, the intervals hold for these
trained models only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from scipy.special import expit, logit

from cxr.errors import UserError
from cxr.evaluation.metrics import group_weights, range_of
from cxr.evaluation.predictions import (
    chosen_draws_of,
    chosen_points_of,
    decided,
    draws_of,
    matrix_of,
    points_of,
)
from cxr.task import KAGGLE, Task

Floats = npt.NDArray[np.float64]
PRIMARY = "roc_auc"
LEVEL = 0.05


class Subject(StrEnum):
    """What is compared: strategies, or backbones under one strategy."""

    STRATEGY = "strategy"
    BACKBONE = "backbone"

    @property
    def plural(self) -> str:
        """The word for several."""
        return "strategies" if self is Subject.STRATEGY else "backbones"


@dataclass(frozen=True, slots=True)
class RunData:
    """The data of one finished run in a comparison. `test` and `val` are prediction tables, `history` has a row per
    epoch, `threshold` is the one chosen on validation, `cost` has values such as total_seconds and parameters_trained,
    `origin` identifies data and weights, `settings` are the other parameters and the commit that determine its
    results. Where backbones are compared (`subject`), `strategy` holds the backbone."""

    run_id: str
    strategy: str
    seed: int
    threshold: float
    val: pd.DataFrame
    test: pd.DataFrame
    history: pd.DataFrame
    cost: dict[str, float]
    origin: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    task: Task = KAGGLE
    subject: Subject = Subject.STRATEGY


@dataclass(frozen=True, slots=True)
class Replicates:
    """Metrics per strategy: `points[strategy][metric]` is [seeds]; `draws[strategy][metric]` [resamples] is the mean
    over seeds in each bootstrap resample; `groups` is the number of patients."""

    points: dict[str, dict[str, Floats]]
    draws: dict[str, dict[str, Floats]]
    groups: int

    def seed_variance(self, metric: str) -> tuple[float, int]:
        """(variance over seeds, degrees of freedom), pooled over the strategies; (0, 0) if none has two seeds."""
        values = [each[metric] for each in self.points.values()]
        freedom = sum(len(each) - 1 for each in values)
        total = sum(float(((each - each.mean()) ** 2).sum()) for each in values)
        return (total / freedom, freedom) if freedom else (0.0, 0)


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """The standard error of an estimate and the degrees of freedom of its t distribution."""

    error: float
    freedom: float

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval."""
        return float(stats.t.ppf(1 - LEVEL / 2, self.freedom)) * self.error

    def p(self, difference: float) -> float:
        """The two-sided p value of a difference from zero; 1 if the error is unknown."""
        if not np.isfinite(self.error):
            return 1.0
        return (
            float(2 * stats.t.sf(abs(difference) / self.error, self.freedom)) if self.error else float(difference == 0)
        )


def _uncertainty(draws: Floats, groups: int, seeds: tuple[float, int], share: float) -> Uncertainty:
    """The uncertainty of an estimate from its `draws` [resamples] and `share` of the variance over seeds.

    Satterthwaite, "An approximate distribution of estimates of variance components", 1946. The error is nan if there
    are fewer than two patients.
    """
    known = draws[np.isfinite(draws)]
    if len(known) < 2 or groups < 2:
        return Uncertainty(float("nan"), 1.0)
    patients, training = float(known.var(ddof=1)), seeds[0] * share
    total = patients + training
    parts = patients**2 / (groups - 1) + (training**2 / seeds[1] if seeds[1] else 0.0)
    return Uncertainty(float(np.sqrt(total)), total**2 / parts if parts else float(groups - 1))


def require_same_images(runs: Sequence[RunData]) -> None:
    """Raise `UserError` unless all runs were evaluated on the same images, or if a strategy has duplicate seeds."""
    first = runs[0]
    for run in runs[1:]:
        if not run.test[["digest", "label"]].equals(first.test[["digest", "label"]]):
            raise UserError(f"runs {first.run_id} and {run.run_id} were evaluated on different images: not comparable")
        if run.task != first.task:
            raise UserError(f"runs {first.run_id} and {run.run_id} have different classes: not comparable")
    keys = [(run.strategy, run.seed) for run in runs]
    duplicates = sorted({f"{strategy} seed {seed}" for strategy, seed in keys if keys.count((strategy, seed)) > 1})
    if duplicates:
        raise UserError(f"duplicate runs: {', '.join(duplicates)}; give one run per {first.subject} and seed")


def strategies_of(runs: Sequence[RunData]) -> list[str]:
    """The strategies, in order of first appearance."""
    return list(dict.fromkeys(run.strategy for run in runs))


def replicate(runs: Sequence[RunData], resamples: int, seed: int = 0) -> Replicates:
    """Every metric for every strategy and resample, with the same resamples for all."""
    groups = list(runs[0].test["group"])
    weights = group_weights(groups, resamples, seed)
    points: dict[str, dict[str, Floats]] = {}
    draws: dict[str, dict[str, Floats]] = {}
    for strategy in strategies_of(runs):
        own = [run for run in runs if run.strategy == strategy]
        each, drawn = [_points(run) for run in own], [_draws(run, weights) for run in own]
        points[strategy] = {name: np.array([values[name] for values in each]) for name in each[0]}
        draws[strategy] = {name: np.mean([values[name] for values in drawn], axis=0) for name in each[0]}
    return Replicates(points, draws, len(set(groups)))


def _points(run: RunData) -> dict[str, float]:
    chosen = chosen_points_of(run.test, run.threshold)
    return points_of(run.test) | {f"chosen_{name}": value for name, value in chosen.items()}


def _draws(run: RunData, weights: Floats) -> dict[str, Floats]:
    chosen = chosen_draws_of(run.test, weights, run.threshold)
    return draws_of(run.test, weights) | {f"chosen_{name}": values for name, values in chosen.items()}


def strategy_table(replicates: Replicates) -> pd.DataFrame:
    """A row for each strategy: seeds, and for each metric its mean, sd over seeds, 95% interval and the seeds' values.

    Columns `{metric}`, `{metric}_sd`, `{metric}_low`, `{metric}_high`, `{metric}_seeds`; sd is nan for a single seed.
    """
    rows = {}
    for strategy, metrics in replicates.points.items():
        row: dict[str, object] = {"seeds": len(metrics[PRIMARY])}
        for name, values in metrics.items():
            uncertainty = _uncertainty(
                replicates.draws[strategy][name],
                replicates.groups,
                replicates.seed_variance(name),
                1 / len(values),
            )
            low, high = _interval(float(values.mean()), uncertainty, name)
            sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
            row |= {name: float(values.mean()), f"{name}_sd": sd, f"{name}_low": low, f"{name}_high": high}
            row[f"{name}_seeds"] = values.tolist()
        rows[strategy] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _interval(value: float, uncertainty: Uncertainty, metric: str) -> tuple[float, float]:
    """The 95% interval: on the logit scale for metrics from 0 to 1, with (nan, nan) at exactly 0 and 1; else clipped to
    the metric's range.
    """
    half_width, (low, high) = uncertainty.half_width, range_of(metric)
    if (low, high) != (0, 1):
        return max(value - half_width, low), min(value + half_width, high)
    if not 0 < value < 1:
        return float("nan"), float("nan")
    half = half_width / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def paired_table(runs: Sequence[RunData], replicates: Replicates, metric: str = PRIMARY) -> pd.DataFrame:
    """A row for each pair of strategies: difference a - b of the means over seeds, its 95% interval, and p values.

    p is from Student's t; p_mcnemar is from the exact McNemar test on the decisions at 0.5 of the probabilities
    averaged over seeds, which assumes independent images. Both are Holm-corrected (1979) over all pairs.
    """
    rows = []
    for a, b in combinations(replicates.points, 2):
        ours, theirs = replicates.points[a][metric], replicates.points[b][metric]
        difference = float(ours.mean() - theirs.mean())
        draws = replicates.draws[a][metric] - replicates.draws[b][metric]
        share = 1 / len(ours) + 1 / len(theirs)
        uncertainty = _uncertainty(draws, replicates.groups, replicates.seed_variance(metric), share)
        low, high = difference - uncertainty.half_width, difference + uncertainty.half_width
        row = {"a": a, "b": b, "difference": difference, "low": low, "high": high, "p": uncertainty.p(difference)}
        rows.append(row | {"p_mcnemar": mcnemar(*(_correct(runs, s) for s in (a, b)))})
    table = pd.DataFrame(rows, columns=["a", "b", "difference", "low", "high", "p", "p_mcnemar"])
    for name in ("p", "p_mcnemar"):
        table[f"{name.replace('p', 'p_holm', 1)}"] = holm(table[name].to_numpy(np.float64))
    return table


def _correct(runs: Sequence[RunData], strategy: str) -> npt.NDArray[np.bool_]:
    own = [run.test for run in runs if run.strategy == strategy]
    mean = np.mean([matrix_of(table) for table in own], axis=0)
    correct: npt.NDArray[np.bool_] = decided(mean) == own[0]["label"].to_numpy(np.int64)
    return correct


def mcnemar(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """The exact two-sided p value of McNemar's test (1947); `a` and `b` [n] are whether each classifier is correct."""
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p: Floats) -> Floats:
    """Holm's step-down adjusted p values [n] (1979)."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def stability_table(runs: Sequence[RunData]) -> pd.DataFrame:
    """A row for each strategy, the mean over seeds: validation-test gap, overfitting gap, variation between epochs.

    val_test_gap: ROC-AUC on validation minus test; overfitting_gap: validation minus training loss in the last epoch;
    epoch_spread: mean absolute change of validation accuracy between consecutive epochs.
    """
    rows = {}
    for strategy in strategies_of(runs):
        own = [_stability(run) for run in runs if run.strategy == strategy]
        rows[strategy] = {name: float(np.mean([each[name] for each in own])) for name in own[0]}
    return pd.DataFrame.from_dict(rows, orient="index")


def _stability(run: RunData) -> dict[str, float]:
    val, test = (points_of(table) for table in (run.val, run.test))
    history, last = run.history, run.history.iloc[-1]
    changes = history["val_accuracy"].diff().abs().dropna()
    return {
        "val_roc_auc": val["roc_auc"],
        "val_test_gap": val["roc_auc"] - test["roc_auc"],
        "overfitting_gap": float(last["val_loss"] - last["train_loss"]),
        "epoch_spread": float(changes.mean()) if len(changes) else float("nan"),
        **run.cost,
    }
