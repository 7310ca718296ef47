"""Evaluation of a logged or registered model on other images, as a separate run, compared with its own test split."""

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
from cxr.evaluation.report import (
    Report,
    arrays_of,
    evaluate,
    format_interval,
    implied_prevalence,
    predictions_table,
    with_selection,
)
from cxr.network.inference import infer_with_features
from cxr.runs.messages import Say
from cxr.runs.record import log_report
from cxr.storage import Cache
from cxr.tracking import registry
from cxr.tracking.lifecycle import open_run
from cxr.tracking.reading import Artifact, LoggedRun, RunKind, Tag, source_run


def evaluate_tracked(uri: str, data_dir: str, bootstrap: int, cache_dir: str, say: Say = print) -> Report:
    """Evaluate a logged or registered model on other images, in a new MLflow run.

    The metrics are named `external_…` for a flat folder of two classes, `test_…` for the test split of a folder in the
    Kaggle layout. Raises `UserError` for a model or a folder that cannot be used, or unreadable images.
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
    batches = eval_batches(make_split(table, store, split), 32, torch.device("cpu"))
    features, logits = infer_with_features(predictor.model, batches)
    predictions = predictions_table(table, logits.numpy(), card.threshold, card.calibration)
    if predictor.familiarity:
        familiar = predictor.familiarity.percentiles(features.numpy())
        predictions = with_selection(predictions, card.threshold, card.certainty_limit, familiar)
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
    """Val and test predictions and the manifest of the run that logged the model; empty if they cannot be read."""
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
    """(metrics, sentences): the drop in ROC-AUC from the model's own test split, and what else changed."""
    if not own:
        return {}, ["the run that logged the model cannot be read: no comparison with its own test split"]
    before, after = own["test"], predictions
    aucs = [_points(table)["roc_auc"] for table in (before, after)]
    metrics = {f"{split}_auc_drop": aucs[0] - aucs[1]}
    low, high = float("nan"), float("nan")
    if bootstrap:  # different images, so the two are resampled independently
        draws = [_auc_draws(table, bootstrap, seed) for seed, table in enumerate((before, after))]
        low, high = (float(value) for value in np.nanquantile(draws[0] - draws[1], [0.025, 0.975]))
        metrics |= {f"{split}_auc_drop_low": low, f"{split}_auc_drop_high": high}
    shares = [float(table["label"].mean()) for table in (own["val"], before, after)]
    words = [
        f"ROC-AUC {aucs[0]:.4f} on the model's own test split, {aucs[1]:.4f} here: drop "
        f"{format_interval((aucs[0] - aucs[1], low, high))}",
        f"prevalence of pneumonia: {shares[0]:.3f} on validation, {shares[1]:.3f} on test, {shares[2]:.3f} here",
        _calibration_words(before, after),
    ]
    if low > 0:
        words.append(
            "WARNING: the model discriminates worse here than on its own test split; its test metrics do not apply"
        )
    return metrics, words


def _seen(own: dict[str, pd.DataFrame], predictions: pd.DataFrame) -> list[str]:
    """Warnings if images, or patients according to file names, were also used to train or select the model."""
    if not own:
        return []
    trained = own["manifest"][own["manifest"]["split"].isin(["train", "val"])]
    known = predictions["subtype"] != "unknown"  # other file names do not identify patients
    copies = int(predictions["digest"].isin(set(trained["digest"])).sum())
    seen = int((known & predictions["group"].isin(set(trained["group"]))).sum())
    head, tail = f"of {len(predictions)} images are", "these metrics are not a valid evaluation"
    words = []
    if copies:
        words.append(f"WARNING: {copies} {head} files that the model was trained or selected on: {tail}")
    if seen:
        words.append(
            f"WARNING: {seen} {head} of patients that the model was trained or selected on, by file names: {tail}"
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
