"""Strategies compared on the same test images: intervals, paired differences, stability, and a verdict by stated rules.

A strategy's figure is the mean over its seeds. Both levels are resampled: images by patient (cluster bootstrap, Field
and Welsh 2007), the same for every run, so that differences are paired; and within each strategy its seeds, so that
another training run of the same strategy is allowed for. With one seed there is nothing to resample: the intervals are
then those of these trained models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from cxr.errors import UserError
from cxr.evaluate import arrays_of
from cxr.metrics import (
    DECISION_METRICS,
    METRICS,
    decision_metrics,
    group_weights,
    point_metrics,
    weighted_decisions,
    weighted_metrics,
)
from cxr.strategies import STRATEGIES

Floats = npt.NDArray[np.float64]
COMPARED = (*METRICS, *(f"chosen_{name}" for name in DECISION_METRICS))
PRIMARY = "roc_auc"
LEVEL = 0.05
CLAIM = "partial fine-tuning gives the best trade-off between performance and stability"


@dataclass(frozen=True, slots=True)
class RunData:
    """What a comparison knows of one finished run. `test` and `val` are predictions tables, `history` a row an epoch,
    `threshold` the one chosen on validation, `cost` figures such as total_seconds and parameters_trained,
    `origin` names data and weights."""

    run_id: str
    strategy: str
    seed: int
    threshold: float
    val: pd.DataFrame
    test: pd.DataFrame
    history: pd.DataFrame
    cost: dict[str, float]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Replicates:
    """Each strategy's figures: `points[strategy][metric]` is [seeds], `draws[strategy][metric]` [resamples], the mean
    over seeds in each resample."""

    points: dict[str, dict[str, Floats]]
    draws: dict[str, dict[str, Floats]]


def require_same_images(runs: Sequence[RunData]) -> None:
    """Raise `UserError` unless all runs were tested on the same images, or when a strategy has a seed twice."""
    first = runs[0]
    for run in runs[1:]:
        if not run.test[["digest", "label"]].equals(first.test[["digest", "label"]]):
            raise UserError(f"runs {first.run_id} and {run.run_id} were tested on different images: not comparable")
    keys = [(run.strategy, run.seed) for run in runs]
    twice = sorted({f"{strategy} seed {seed}" for strategy, seed in keys if keys.count((strategy, seed)) > 1})
    if twice:
        raise UserError(f"there twice: {', '.join(twice)}; name one run for each strategy and seed")


def strategies_of(runs: Sequence[RunData]) -> list[str]:
    """The strategies, in the order in which they come."""
    return list(dict.fromkeys(run.strategy for run in runs))


def replicate(runs: Sequence[RunData], resamples: int, seed: int = 0) -> Replicates:
    """Every metric of `COMPARED` for every strategy and resample; the resamples are the same for all."""
    weights = group_weights(list(runs[0].test["group"]), resamples, seed)
    points: dict[str, dict[str, Floats]] = {}
    draws: dict[str, dict[str, Floats]] = {}
    rng = np.random.default_rng([seed, 1])
    for strategy in strategies_of(runs):
        own = [run for run in runs if run.strategy == strategy]
        picks = rng.integers(len(own), size=(len(own), resamples))
        each = [_points(run) for run in own]
        points[strategy] = {name: np.array([values[name] for values in each]) for name in COMPARED}
        drawn = [_draws(run, weights) for run in own]
        draws[strategy] = {
            name: _mean_of_picked(np.array([values[name] for values in drawn]), picks) for name in COMPARED
        }
    return Replicates(points, draws)


def _mean_of_picked(values: Floats, picks: npt.NDArray[np.int64]) -> Floats:
    """The mean [resamples] over the seeds drawn for each resample; both arguments are [seeds, resamples]."""
    mean: Floats = np.take_along_axis(values, picks, 0).mean(0)
    return mean


def _points(run: RunData) -> dict[str, float]:
    labels, probabilities = arrays_of(run.test)
    chosen = decision_metrics(labels, probabilities, run.threshold)
    return point_metrics(labels, probabilities) | {f"chosen_{name}": value for name, value in chosen.items()}


def _draws(run: RunData, weights: Floats) -> dict[str, Floats]:
    labels, probabilities = arrays_of(run.test)
    chosen = weighted_decisions(labels, probabilities, weights, run.threshold)
    every = weighted_metrics(labels, probabilities, weights, 0.5)
    return every | {f"chosen_{name}": values for name, values in chosen.items()}


def strategy_table(replicates: Replicates) -> pd.DataFrame:
    """A row for each strategy: seeds, and for each metric its mean, sd over seeds, 95% interval and the seeds' values.

    Columns `{metric}`, `{metric}_sd`, `{metric}_low`, `{metric}_high`, `{metric}_seeds`; sd is nan for a single seed.
    """
    rows = {}
    for strategy, metrics in replicates.points.items():
        row: dict[str, object] = {"seeds": len(metrics[PRIMARY])}
        for name, values in metrics.items():
            low, high = _interval(replicates.draws[strategy][name])
            sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
            row |= {name: float(values.mean()), f"{name}_sd": sd, f"{name}_low": low, f"{name}_high": high}
            row[f"{name}_seeds"] = values.tolist()
        rows[strategy] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _interval(draws: Floats) -> tuple[float, float]:
    low, high = np.nanquantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def paired_table(runs: Sequence[RunData], replicates: Replicates, metric: str = PRIMARY) -> pd.DataFrame:
    """A row for each pair of strategies: difference a - b of the means over seeds, its 95% interval, and p values.

    p is the bootstrap's two-sided one, at least 1/resamples; McNemar's (exact) compares the decisions, at 0.5, of the
    probabilities averaged over seeds. Holm (1979) corrects each over all pairs.
    """
    rows = []
    for a, b in combinations(replicates.points, 2):
        difference = float(replicates.points[a][metric].mean() - replicates.points[b][metric].mean())
        draws = replicates.draws[a][metric] - replicates.draws[b][metric]
        draws = draws[np.isfinite(draws)]
        low, high = _interval(draws) if len(draws) else (np.nan, np.nan)
        p = min(1.0, 2 * max(min((draws <= 0).mean(), (draws >= 0).mean()), 1 / len(draws))) if len(draws) else 1.0
        row = {"a": a, "b": b, "difference": difference, "low": low, "high": high, "p": p}
        rows.append(row | {"p_mcnemar": mcnemar(*(_correct(runs, s) for s in (a, b)))})
    table = pd.DataFrame(rows, columns=["a", "b", "difference", "low", "high", "p", "p_mcnemar"])
    for name in ("p", "p_mcnemar"):
        table[f"{name.replace('p', 'p_holm', 1)}"] = holm(table[name].to_numpy(np.float64))
    return table


def _correct(runs: Sequence[RunData], strategy: str) -> npt.NDArray[np.bool_]:
    own = [arrays_of(run.test) for run in runs if run.strategy == strategy]
    decided = np.mean([probabilities for _, probabilities in own], axis=0) >= 0.5
    correct: npt.NDArray[np.bool_] = decided == (own[0][0] == 1)
    return correct


def mcnemar(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """The exact two-sided p of McNemar's test (1947) for who is right [n] on the same images."""
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p: Floats) -> Floats:
    """Holm's step-down adjusted p values [n] (1979)."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def stability_table(runs: Sequence[RunData]) -> pd.DataFrame:
    """A row for each strategy, the mean over seeds: validation-test gap and overfitting gap, spread between epochs.

    val_test_gap: ROC-AUC on validation less test; overfitting_gap: validation less training loss at the last epoch;
    epoch_spread: mean absolute change of validation accuracy from epoch to epoch.
    """
    rows = {}
    for strategy in strategies_of(runs):
        own = [_stability(run) for run in runs if run.strategy == strategy]
        rows[strategy] = {name: float(np.mean([each[name] for each in own])) for name in own[0]}
    return pd.DataFrame.from_dict(rows, orient="index")


def _stability(run: RunData) -> dict[str, float]:
    val, test = (point_metrics(*arrays_of(table)) for table in (run.val, run.test))
    history, last = run.history, run.history.iloc[-1]
    changes = history["val_accuracy"].diff().abs().dropna()
    return {
        "val_roc_auc": val["roc_auc"],
        "val_test_gap": val["roc_auc"] - test["roc_auc"],
        "overfitting_gap": float(last["val_loss"] - last["train_loss"]),
        "epoch_spread": float(changes.mean()) if len(changes) else float("nan"),
        **run.cost,
    }


def verdict(table: pd.DataFrame, pairs: pd.DataFrame, margin: float, metric: str = PRIMARY) -> list[str]:
    """Sentences: who is ahead, who cannot be told from it, and what became of the claim, each by a stated rule.

    Two strategies are *not distinguishable* when Holm's p of their difference is above 0.05. One is *non-inferior* to
    another when the lower end of its difference lies above minus `margin`. The spread of three seeds is described, not
    tested. The claim holds when `partial` is non-inferior to every other of the four and no other that is so, too,
    varies less over the seeds (3 at least).
    """
    if len(table) < 2:
        return [f"only {table.index[0]} was run: nothing to compare"]
    best = str(table[metric].idxmax())
    row = table.loc[best]
    fewest, most = int(table["seeds"].min()), int(table["seeds"].max())
    seeds = f"{most} seed(s) each" if fewest == most else f"{fewest} to {most} seeds"
    lines = [
        f"test {metric}, {seeds}: {best} has the highest mean, {row[metric]:.4f} [{row[f'{metric}_low']:.4f}, "
        f"{row[f'{metric}_high']:.4f}]"
    ]
    lines += [_against(best, other, pairs, margin) for other in table.index if other != best]
    return [*lines, _claim(table, pairs, margin, metric)]


def _difference(a: str, b: str, pairs: pd.DataFrame) -> tuple[float, float, float, float]:
    """(a - b, low, high, Holm's p), whichever way the pair is in the table."""
    for row in pairs.to_dict("records"):
        if (row["a"], row["b"]) == (a, b):
            return row["difference"], row["low"], row["high"], row["p_holm"]
        if (row["b"], row["a"]) == (a, b):
            return -row["difference"], -row["high"], -row["low"], row["p_holm"]
    raise KeyError((a, b))


def _against(best: str, other: str, pairs: pd.DataFrame, margin: float) -> str:
    difference, low, high, p = _difference(other, best, pairs)
    words = "worse than" if p <= LEVEL else "not distinguishable from"
    also = f", non-inferior within {margin:g}" if low > -margin else f", not shown to be non-inferior within {margin:g}"
    return f"{other} is {words} {best}: {difference:+.4f} [{low:+.4f}, {high:+.4f}], Holm p {p:.3f}{also}"


def _claim(table: pd.DataFrame, pairs: pd.DataFrame, margin: float, metric: str) -> str:
    head = f"the claim that {CLAIM}"
    if "partial" not in table.index:
        return f"{head} was not tested: partial was not run"
    others = [name for name in table.index if name != "partial"]
    worse = [other for other in others if _is_worse("partial", other, pairs)]
    if worse:
        return f"{head} is not supported: partial is worse than {', '.join(worse)}"
    unsure = [other for other in others if _difference("partial", other, pairs)[1] <= -margin]
    if unsure:
        names = ", ".join(unsure)
        return f"{head} is not decided: partial is not shown to be non-inferior (margin {margin:g}) to {names}"
    if table["seeds"].min() < 3:
        return f"{head} is not decided: partial is non-inferior, but stability needs 3 seeds of each strategy"
    rivals = [o for o in others if all(_difference(o, x, pairs)[1] > -margin for x in table.index if x != o)]
    steadier = [o for o in rivals if table.loc[o, f"{metric}_sd"] < table.loc["partial", f"{metric}_sd"]]
    if steadier:
        return f"{head} is not supported: {', '.join(steadier)} performs as well and varies less over the seeds"
    missing = [name for name in STRATEGIES if name not in table.index]
    if missing:
        return f"{head} holds among those compared, but is not decided: {', '.join(missing)} was not run"
    return f"{head} is supported: non-inferior to all, and none that is varies less over the seeds"


def _is_worse(a: str, b: str, pairs: pd.DataFrame) -> bool:
    difference, _, _, p = _difference(a, b, pairs)
    return difference < 0 and p <= LEVEL
