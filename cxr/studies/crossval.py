"""Cross-validation: a child run per fold; pooled out-of-fold metrics in the parent run. The test split is not used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from cxr.config import CrossvalConfig, TrainConfig
from cxr.evaluation.predictions import HALF
from cxr.evaluation.report import Report, evaluate, format_interval
from cxr.figures import single as plots
from cxr.figures.html import html_page
from cxr.runs.messages import Say
from cxr.runs.page import crossval_page
from cxr.runs.record import report_figures
from cxr.studies.family import run_family
from cxr.tracking.nested import log_once
from cxr.tracking.reading import Artifact, LoggedRun, RunKind, Tag, plot_path
from cxr.tracking.tracker import MlflowTracker

SHOWN = ("roc_auc", "accuracy", "recall", "specificity")


def crossval_tracked(config: CrossvalConfig, say: Say = print) -> pd.DataFrame:
    """Train and evaluate every fold; returns a table with the metrics of each fold.

    Repeating the call after an interruption continues it. Raises `UserError` for invalid input.
    """
    train = config.train
    name = f"crossval-{train.strategy}-{config.folds}"
    tags: dict[str, str] = {Tag.KIND: RunKind.CROSSVAL, Tag.STRATEGY: train.strategy, Tag.SEED: str(train.seed)}
    with run_family(config, _members(config), name, tags, say) as (parent, run_ids):
        table, pooled = _gather(run_ids, train.bootstrap)
        lines = _publish(parent, config, table, pooled)
    say("\n" + "\n".join([*lines, *(f"look: {where}" for where in parent.where(RunKind.CROSSVAL))]))
    return table


def _members(config: CrossvalConfig) -> dict[str, TrainConfig]:
    return {
        f"fold-{fold}-of-{config.folds}": replace(config.train, fold=f"{fold}/{config.folds}", register="none")
        for fold in range(1, config.folds + 1)
    }


def _gather(run_ids: Sequence[str], bootstrap: int) -> tuple[pd.DataFrame, Report]:
    """(metrics per fold, report of the pooled out-of-fold predictions)."""
    # Each fold abstains by a threshold of its own, which says nothing about decisions at one half.
    own = ["familiarity", "abstain"]
    tables = [LoggedRun.open(run_id).predictions("fold").drop(columns=own, errors="ignore") for run_id in run_ids]
    task = LoggedRun.open(run_ids[0]).task
    reports = [evaluate(table, "fold", HALF, 0) for table in tables]
    rows = [{"fold": i + 1, "images": len(r.table), **r.values, "run": run_ids[i]} for i, r in enumerate(reports)]
    pooled = evaluate(pd.concat(tables, ignore_index=True), "fold", HALF, bootstrap, origin="same for all folds")
    return pd.DataFrame(rows), pooled.about(task)


def _publish(parent: MlflowTracker, config: CrossvalConfig, table: pd.DataFrame, pooled: Report) -> list[str]:
    """Log tables, figures and summary to the parent run; returns the summary lines."""
    name = f"{config.train.strategy}, {config.folds} folds"
    mean, sd = table[list(SHOWN)].mean(), table[list(SHOWN)].std(ddof=1)
    lines = [f"{name} (by patient, without the test split), mean and sd over folds, threshold 0.5:"]
    lines += [f"{m}: {mean[m]:.4f} +- {sd[m]:.4f}; pooled {format_interval(pooled.interval(m))}" for m in SHOWN]
    lines.append(f"pooled: out-of-fold predictions of the {config.folds} models; the intervals cover patients only")
    parent.table(table, Artifact.FOLDS)
    parent.table(pooled.table, Artifact.OUT_OF_FOLD)
    parent.text(pooled.text(), Artifact.CROSSVAL_REPORT)
    figures = {
        "folds": plots.folds(table.set_index("fold"), SHOWN, f"Folds: {name}"),
        **_pooled_figures(pooled, f"Out of fold: {name}"),
    }
    for kind, figure in figures.items():
        parent.figure(figure, plot_path(kind, "crossval"))
    parent.text(html_page(crossval_page(config.train.strategy, table, pooled, figures)), Artifact.CROSSVAL_PAGE)
    folds = {f"fold_{m}_mean": float(mean[m]) for m in SHOWN} | {f"fold_{m}_sd": float(sd[m]) for m in SHOWN}
    log_once(parent, folds | {f"pooled_{m}": value for m, value in pooled.values.items()})
    parent.tags({Tag.DESCRIPTION: "\n\n".join(lines)})
    return lines


def _pooled_figures(pooled: Report, title: str) -> dict[str, Figure]:
    """Those of a report, at one half and without calibration of the whole."""
    labels, probabilities = pooled.labels, pooled.probabilities
    if not pooled.binary:
        return report_figures(pooled, title, {"roc", "confusion_matrix", "metrics"})
    return {
        "roc": plots.roc_curve(labels, probabilities, pooled.interval("roc_auc"), title),
        "pr": plots.pr_curve(labels, probabilities, pooled.interval("pr_auc"), title),
        "confusion_matrix": plots.confusion_matrix(pooled.counts(), pooled.task.classes, title),
        "reliability": plots.reliability_diagram(labels, probabilities, pooled.values["ece"], title),
    }
