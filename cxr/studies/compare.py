"""Comparing strategies, or backbones under one strategy: from new runs, one for each and seed, or finished ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxr.config import NEUTRAL, CompareConfig, TrainConfig
from cxr.errors import UserError
from cxr.evaluation.metrics import Floats, Ints, counts_of
from cxr.evaluation.paired import (
    PRIMARY,
    RunData,
    Subject,
    paired_table,
    replicate,
    require_same_images,
    stability_table,
    strategies_of,
    strategy_table,
)
from cxr.evaluation.predictions import arrays_of, decided, matrix_of
from cxr.evaluation.verdict import Verdict, decide
from cxr.evaluation.verdict_text import sentences
from cxr.figures import strategies as draw
from cxr.figures.html import Matrix, html_page
from cxr.runs.ensemble import ensemble_tracked
from cxr.runs.messages import Say
from cxr.strategies import STRATEGIES
from cxr.studies.comparison_page import Results, comparison_page
from cxr.studies.family import run_family
from cxr.tracking.nested import children, ending, join_parent, log_once, open_parent
from cxr.tracking.reading import Artifact, LoggedRun, RunKind, Tag, plot_path
from cxr.tracking.store import prepare
from cxr.tracking.tracker import MlflowTracker

COST = ("parameters_trained", "total_seconds", "peak_memory_mb")
BARS = ("roc_auc", "accuracy", "recall", "specificity")
RESAMPLES = 2000


def compare_tracked(config: CompareConfig, say: Say = print) -> Verdict:
    """Run every strategy, or one with every backbone, with every seed and compare.

    The same call after an interruption continues: finished child runs are reused, the others resumed. Raises
    `UserError` for bad input.
    """
    subject = Subject.BACKBONE if len(config.backbones()) > 1 else Subject.STRATEGY
    compared = max(len(config.chosen()), len(config.backbones()))
    name = f"compare-{compared}x{config.seeds}"
    tags: dict[str, str] = {Tag.KIND: RunKind.COMPARISON}
    with run_family(config, _members(config), name, tags, say) as (parent, run_ids):
        runs = [load_run(run_id, subject) for run_id in run_ids]
        if config.ensemble:
            _ensembles(config, parent.run_id, runs, say)
        verdict = _publish(parent, runs, config.margin)
    say("\n" + "\n".join([*sentences(verdict), *_links(parent, run_ids, RunKind.COMPARISON)]))
    return verdict


def _ensembles(config: CompareConfig, parent: str, runs: Sequence[RunData], say: Say) -> None:
    """An ensemble of the seeds of each strategy or backbone, unless an interrupted call has already finished it."""
    train = config.train
    done = {run.params["ensemble.runs"] for run in children(parent) if run.kind is RunKind.ENSEMBLE and run.finished}
    for strategy in strategies_of(runs):
        seeds = [run.run_id for run in runs if run.strategy == strategy]
        if " ".join(seeds) not in done:
            ensemble_tracked(seeds, train.register, train.data_dir, train.cache_dir, say, parent)


def compare_runs(run_ids: Sequence[str], margin: float, say: Say = print) -> Verdict:
    """Compare finished runs; the result is logged in a new run. Raises `UserError` for runs that cannot be compared."""
    prepare()
    subject = _subject_of(run_ids)
    runs = [load_run(run_id, subject) for run_id in run_ids]
    require_same_images(runs)
    params = {"compare.runs": " ".join(run_ids), "compare.margin": str(margin)}
    parent = join_parent(open_parent("compare-runs", {Tag.KIND: RunKind.COMPARISON}, params))
    with ending(parent.run_id):
        verdict = _publish(parent, runs, margin)
    say("\n".join([*sentences(verdict), *_links(parent, run_ids)]))
    return verdict


def _subject_of(run_ids: Sequence[str]) -> Subject:
    """Backbones, if the runs differ in them and in no strategy."""
    tags = [LoggedRun.open(run_id).tags for run_id in run_ids]
    strategies, archs = ({each.get(name) for each in tags} for name in (Tag.STRATEGY, Tag.ARCH))
    return Subject.BACKBONE if len(strategies) == 1 and len(archs) > 1 else Subject.STRATEGY


def _members(config: CompareConfig) -> dict[str, TrainConfig]:
    """Run name -> configuration, seed by seed: an interrupted comparison has all strategies for the first seeds."""
    epochs, several = config.epochs_of(), len(config.backbones()) > 1
    return {
        f"{arch if several else strategy}-s{seed}": replace(
            config.train, arch=arch, strategy=strategy, seed=seed, epochs=epochs[strategy]
        )
        for seed in range(config.train.seed, config.train.seed + config.seeds)
        for strategy in config.chosen()
        for arch in config.backbones()
    }


def load_run(run_id: str, subject: Subject = Subject.STRATEGY) -> RunData:
    """What a finished training run logged. Raises `UserError` for an unknown run, or one that is no training run."""
    run = LoggedRun.open(run_id)
    if not run.finished:
        raise UserError(f"run {run_id} is {run.status}: only finished runs can be compared")
    if np.isnan(run.threshold) and run.task.binary:
        raise UserError(f"run {run_id} has no chosen threshold: not a training run of this version of cxr")
    if "test_roc_auc" not in run.metrics:
        raise UserError(f"run {run_id} was not evaluated on the test split: it is a fold or not a training run")
    history = run.table(Artifact.HISTORY)
    return RunData(
        run_id=run_id,
        strategy=run.tags[Tag.STRATEGY if subject is Subject.STRATEGY else Tag.ARCH],
        seed=int(run.tags[Tag.SEED]),
        threshold=run.threshold,
        val=run.predictions("val"),
        test=run.predictions("test"),
        history=history,
        cost=_cost(run, history),
        origin=run.origin if subject is Subject.STRATEGY else f"data {run.tags.get(Tag.DATA_FINGERPRINT)}",
        task=run.task,
        settings=_settings(run, subject),
        subject=subject,
    )


def _cost(run: LoggedRun, history: pd.DataFrame) -> dict[str, float]:
    return {
        **{name: run.metrics[name] for name in COST if name in run.metrics},
        "images_per_second": float(history["images_per_second"].median()),
        "training_seconds": float((history["epoch_seconds"] + history["eval_seconds"]).sum()),
        "epochs": float(len(history)),
        "best_val_loss": float(history["val_loss"].min()),
        "test_uses_before": run.metrics.get("test_uses_before", 0.0),
    }


def _settings(run: LoggedRun, subject: Subject) -> dict[str, str]:
    """What determines a run's numbers besides strategy, seed, data and weights: parameters and the git commit.

    Backbones differ in their weights, which are settings there.
    """
    if subject is Subject.STRATEGY:
        excluded, weights = {"strategy", "seed"}, {}
    else:
        excluded, weights = {"arch", "seed"}, {"weights": run.tags.get(Tag.WEIGHTS, "unknown")}
    known = {name: value for name, value in run.train_params().items() if name not in NEUTRAL | excluded}
    return known | weights | {"code": run.commit}


def _publish(parent: MlflowTracker, runs: Sequence[RunData], margin: float) -> Verdict:
    """Log tables, figures, report and verdict in the parent run."""
    require_same_images(runs)
    replicates = replicate(runs, RESAMPLES)
    table, pairs, stability = strategy_table(replicates), paired_table(runs, replicates), stability_table(runs)
    subject = runs[0].subject
    verdict = decide(table, pairs, margin, subject)
    whole = table.join(stability)
    figures = _figures(runs, whole, pairs, margin)
    artifact = Artifact.STRATEGIES if subject is Subject.STRATEGY else Artifact.BACKBONES
    parent.table(whole.reset_index(names=subject.value), artifact)
    parent.table(pairs, Artifact.PAIRS)
    for name, figure in figures.items():
        parent.figure(figure, plot_path(name, "comparison"))
    decisions = {name: Matrix(counts, runs[0].task.classes) for name, counts in _mean_counts(runs).items()}
    ensembles = [run for run in children(parent.run_id) if run.kind is RunKind.ENSEMBLE and run.finished]
    results, remarks = Results(verdict, table, pairs, stability, decisions, ensembles), notes(runs, margin)
    parent.text(html_page(comparison_page(runs, results, figures, remarks)), Artifact.COMPARISON_REPORT)
    log_once(parent, {f"{s}_{m}": float(table.loc[s, m]) for s in table.index for m in ("roc_auc", "accuracy")})
    lines = sentences(verdict)
    parent.tags({Tag.VERDICT: lines[-1], Tag.DESCRIPTION: "\n\n".join([*lines, *remarks])})
    return verdict


def notes(runs: Sequence[RunData], margin: float) -> list[str]:
    """What a reader needs to know besides the verdict: images, statistics, uses of the test split, unequal settings."""
    uses = max(0, int(max(run.cost["test_uses_before"] for run in runs)) - (len(runs) - 1))
    seeds = {strategy: sum(run.strategy == strategy for run in runs) for strategy in strategies_of(runs)}
    return [
        f"{len(runs[0].test)} test images of {runs[0].test['group'].nunique()} patients; "
        + ", ".join(f"{strategy} {count} seed(s)" for strategy, count in seeds.items()),
        f"intervals: Student's t with the sum of two variances, over {RESAMPLES} resamples of patients and over seeds "
        f"(pooled over the {runs[0].subject.plural}); p corrected by Holm over all pairs; margin {margin:g}; McNemar's "
        "test treats images as independent and uses the mean probabilities over seeds",
        f"apart from these runs, this test split was evaluated {uses} times in this store"
        + ("; for anything chosen after seeing those results, it is no longer a test" if uses else ""),
        "training seconds are those of the epochs; activations stored by an earlier run cost nothing there",
        *_unequal(runs),
    ]


def _unequal(runs: Sequence[RunData]) -> list[str]:
    """Notes on what the runs do not share; a warning where runs of one strategy differ in more than the seed."""
    origins = sorted({run.origin for run in runs})
    found = [f"WARNING: these runs use different data or initial weights: {'; '.join(origins)}"] if origins[1:] else []
    by_strategy = {strategy: _settings_of(runs, strategy) for strategy in strategies_of(runs)}
    for strategy, settings in by_strategy.items():
        unequal = [f"{name} ({', '.join(values)})" for name, values in settings.items() if len(values) > 1]
        if unequal:
            found.append(f"WARNING: the runs of {strategy} differ not only in the seed: {'; '.join(unequal)}")
    for name in sorted({name for settings in by_strategy.values() for name in settings}):
        values = {strategy: "/".join(settings.get(name, ["unknown"])) for strategy, settings in by_strategy.items()}
        if len(set(values.values())) > 1:
            found.append(f"{name}: " + ", ".join(f"{strategy} {value}" for strategy, value in values.items()))
    return found


def _settings_of(runs: Sequence[RunData], strategy: str) -> dict[str, list[str]]:
    """Setting -> its different values among the runs of a strategy."""
    own = [run.settings for run in runs if run.strategy == strategy]
    names = sorted({name for settings in own for name in settings})
    return {name: sorted({settings.get(name, "unknown") for settings in own}) for name in names}


def _figures(runs: Sequence[RunData], table: pd.DataFrame, pairs: pd.DataFrame, margin: float) -> dict[str, Figure]:
    names = strategies_of(runs)
    own = {name: [run for run in runs if run.strategy == name] for name in names}
    labels, classes = runs[0].test["label"].to_numpy(np.int64), runs[0].task.classes
    rule = "threshold 0.5" if runs[0].task.binary else "the most probable class decides"
    figures = {
        "metrics": draw.metric_intervals(table, BARS, f"Test, {rule}"),
        "curves": draw.strategy_curves({n: [run.history for run in own[n]] for n in names}, "Validation"),
        "confusion": draw.confusion_row(_mean_counts(runs), classes, f"Test, {rule}, mean over seeds"),
        "cost": draw.quality_cost(table, PRIMARY, "training_seconds", "Quality against cost"),
    }
    if runs[0].task.binary:
        scores = {name: (labels, [arrays_of(run.test)[1] for run in own[name]]) for name in names}
        figures["roc"] = draw.roc_overlay(scores, "ROC on test")
    else:
        recalls = [f"recall_of_{slug}" for slug in runs[0].task.slugs]
        figures["classes"] = draw.metric_intervals(table, recalls, "Test, recall of each class")
    if len(pairs):
        figures["differences"] = draw.paired_differences(pairs, PRIMARY, margin, "Paired differences on test")
    return figures


def _mean_counts(runs: Sequence[RunData]) -> dict[str, Floats]:
    """The confusion matrix [k, k] of each strategy, mean over its seeds."""
    return {
        name: np.mean([_counts(run) for run in runs if run.strategy == name], axis=0) for name in strategies_of(runs)
    }


def _counts(run: RunData) -> Ints:
    """The confusion matrix [k, k] of a run on test, at one half for two classes."""
    return counts_of(run.test["label"].to_numpy(np.int64), decided(matrix_of(run.test)), len(run.task.classes))


def _links(parent: MlflowTracker, run_ids: Sequence[str], kind: RunKind | None = None) -> list[str]:
    """Lines that say where the report is, and link to the runs side by side in MLflow."""
    ids = json.dumps(list(run_ids), separators=(",", ":"))
    where = parent.where(kind)
    page = where[-1].split("/#/")[0]
    experiments = json.dumps([parent.experiment_id], separators=(",", ":"))
    chosen = f"{page}/#/compare-runs?runs={ids}&experiments={experiments}"
    report = f"report: {Artifact.COMPARISON_REPORT} in run {parent.run_id}"
    others = f"strategies: {', '.join(STRATEGIES)}; `cxr compare --runs ID ID …` compares any finished runs"
    return [others, report, *(f"look: {line}" for line in [*where, chosen])]
