"""A logged or registered model on other images, as a run of its own, held against what it was on its own test split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from cxr.data.batches import eval_batches, make_split
from cxr.data.kaggle import index_for_evaluation
from cxr.data.load import bad_paths, list_bad
from cxr.data.splits import fingerprint
from cxr.data.store import open_store
from cxr.errors import UserError
from cxr.evaluation.metrics import Floats, group_weights, point_metrics, weighted_metrics
from cxr.evaluation.report import Report, arrays_of, evaluate, format_interval, implied_prevalence, predictions_table
from cxr.network.inference import infer
from cxr.runs.messages import Say
from cxr.runs.record import log_report
from cxr.storage import Cache
from cxr.tracking import registry
from cxr.tracking.lifecycle import open_run
from cxr.tracking.reading import Artifact, LoggedRun, RunKind, Tag, source_run


def evaluate_tracked(uri: str, data_dir: str, bootstrap: int, cache_dir: str, say: Say = print) -> Report:
    """Evaluate a logged or registered model on other images, in an MLflow run of its own.

    The figures are named `external_…` for a flat folder of two classes, `test_…` for the test split of a Kaggle-shaped
    one. Raises `UserError` for a model or a folder that cannot be used, or unreadable images.
    """
    predictor = registry.load(uri)
    card = predictor.card
    root, table, split = index_for_evaluation(data_dir)
    files = [root / path for path in table["path"]]
    store = open_store(files, list(table["digest"]), card.image_size, card.resize, Cache.open(cache_dir))
    if bad := bad_paths(table, store):
        raise UserError(f"{len(bad)} unreadable image(s) in {root}: {list_bad(bad)}; fix or remove them")
    table = table.assign(split=split)
    images = fingerprint(table)
    logits, _ = infer(predictor.model, eval_batches(make_split(table, store, split), 32, torch.device("cpu")))
    predictions = predictions_table(table, logits.numpy(), card.threshold, card.calibration)
    own = _own_tables(uri)
    prevalence = implied_prevalence(card.calibration, float(own["val"]["label"].mean())) if own else None
    report = evaluate(predictions, split, card.threshold, bootstrap, prevalence)
    drop, words = _drop(own, predictions, split, bootstrap)
    words += _seen(own, predictions)
    with open_run(f"evaluate-{root.name}") as tracker:
        tracker.params({"evaluate.model": uri, "evaluate.data_dir": str(root), "evaluate.bootstrap": str(bootstrap)})
        tags: dict[str, str] = {Tag.STRATEGY: card.strategy, Tag.DATA_FINGERPRINT: images, Tag.KIND: RunKind.EVALUATION}
        if uses := tracker.count({Tag.TEST_SPLIT: images}):
            words.append(f"these images were evaluated {uses} times before in this store")
        tracker.tags({**tags, Tag.TEST_SPLIT: images})
        tracker.dataset(table, str(root), f"{images}-{split}", "evaluation")
        log_report(tracker, report, f"{uri} on {root.name}")
        tracker.metrics(report.metrics() | drop)
        tracker.tags({Tag.DESCRIPTION: "\n\n".join(words)})
        say("\n".join([report.text(), *words, *(f"look: {where}" for where in tracker.where())]))
    return report


def _own_tables(uri: str) -> dict[str, pd.DataFrame]:
    """Validation and test predictions and the manifest of the run that the model comes from; empty where they cannot
    be had."""
    run_id = source_run(uri)
    if run_id is None:
        return {}
    try:
        run = LoggedRun.open(run_id)
        tables = {split: run.predictions(split) for split in ("val", "test")}
        return tables | {"manifest": run.table(Artifact.MANIFEST)}
    except UserError:
        return {}


def _drop(
    own: dict[str, pd.DataFrame], predictions: pd.DataFrame, split: str, bootstrap: int
) -> tuple[dict[str, float], list[str]]:
    """(figures, sentences): how much of the ROC-AUC on the model's own test split is lost, and what else has moved."""
    if not own:
        return {}, ["the run that the model comes from cannot be read: nothing to hold these figures against"]
    before, after = own["test"], predictions
    aucs = [_points(table)["roc_auc"] for table in (before, after)]
    figures = {f"{split}_auc_drop": aucs[0] - aucs[1]}
    low, high = float("nan"), float("nan")
    if bootstrap:  # other images, so the two are resampled apart
        draws = [_auc_draws(table, bootstrap, seed) for seed, table in enumerate((before, after))]
        low, high = (float(value) for value in np.nanquantile(draws[0] - draws[1], [0.025, 0.975]))
        figures |= {f"{split}_auc_drop_low": low, f"{split}_auc_drop_high": high}
    shares = [float(table["label"].mean()) for table in (own["val"], before, after)]
    words = [
        f"ROC-AUC {aucs[0]:.4f} on the model's own test split, {aucs[1]:.4f} here: drop "
        f"{format_interval((aucs[0] - aucs[1], low, high))}",
        f"share of pneumonia: {shares[0]:.3f} on validation, {shares[1]:.3f} on test, {shares[2]:.3f} here",
        _calibration_words(before, after),
    ]
    if low > 0:
        words.append("WARNING: the model ranks these images worse than its own; do not carry its figures over to them")
    return figures, words


def _seen(own: dict[str, pd.DataFrame], predictions: pd.DataFrame) -> list[str]:
    """Warnings when images, or patients by file names, of the model's training are among those it is evaluated on."""
    if not own:
        return []
    trained = own["manifest"][own["manifest"]["split"].isin(["train", "val"])]
    known = predictions["subtype"] != "unknown"  # other names tell no patient
    copies = int(predictions["digest"].isin(set(trained["digest"])).sum())
    seen = int((known & predictions["group"].isin(set(trained["group"]))).sum())
    head, tail = f"of {len(predictions)} images are", "these figures are no evaluation"
    words = []
    if copies:
        words.append(f"WARNING: {copies} {head} files that the model was trained or chosen on: {tail}")
    if seen:
        words.append(
            f"WARNING: {seen} {head} of patients that the model was trained or chosen on, if file names tell: {tail}"
        )
    return words


def _calibration_words(before: pd.DataFrame, after: pd.DataFrame) -> str:
    eces = [_points(table)["ece"] for table in (before, after)]
    return (
        f"calibration: ECE {eces[0]:.4f} on test, {eces[1]:.4f} here; mean probability "
        f"{after['probability'].mean():.3f} where {after['label'].mean():.3f} have pneumonia"
    )


def _points(table: pd.DataFrame) -> dict[str, float]:
    return point_metrics(*arrays_of(table))


def _auc_draws(table: pd.DataFrame, resamples: int, seed: int) -> Floats:
    weights = group_weights(list(table["group"]), resamples, seed)
    return weighted_metrics(*arrays_of(table), weights, 0.5)["roc_auc"]
