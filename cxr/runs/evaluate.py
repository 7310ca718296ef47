"""Evaluation of a logged or registered model on other images, as a separate run, compared with its own test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cxr.config import TrainConfig
from cxr.data.batches import eval_batches, make_split
from cxr.data.headers import read_headers
from cxr.data.kaggle import UNLABELLED
from cxr.data.load import HIDDEN_HINT, bad_paths, list_bad
from cxr.data.memory import Memory
from cxr.data.sources import to_evaluate
from cxr.data.splits import fingerprint
from cxr.data.store import open_store
from cxr.errors import UserError
from cxr.evaluation.metrics import Floats, group_weights
from cxr.evaluation.predictions import classes_in, draws_of, matrix_of, points_of, predictions_table
from cxr.evaluation.report import (
    UNFAMILIAR,
    certainties_of,
    evaluate,
    format_interval,
    implied_prevalence,
    with_selection,
)
from cxr.evaluation.selective import estimated_accuracy
from cxr.figures.html import html_page
from cxr.runs.messages import Say
from cxr.runs.page import evaluation_page
from cxr.runs.record import log_metrics, log_report
from cxr.serving.predictor import ModelCard
from cxr.storage import Cache
from cxr.task import Task
from cxr.tracking import registry
from cxr.tracking.lifecycle import open_run
from cxr.tracking.reading import Artifact, LoggedRun, RunKind, Tag, predictions_path, source_run
from cxr.tracking.tracker import MlflowTracker


@dataclass(frozen=True, slots=True)
class Predicted:
    """Images to evaluate on: the model's address and card, where they are, their predictions and fingerprint."""

    uri: str
    card: ModelCard
    root: Path
    table: pd.DataFrame
    split: str
    predictions: pd.DataFrame

    @property
    def fingerprint(self) -> str:
        """Identifies the images."""
        return fingerprint(self.table)


def evaluate_tracked(uri: str, config: TrainConfig, say: Say = print) -> None:
    """Evaluate a logged or registered model on other images, in a new MLflow run.

    Of the configuration, what decides how images are read matters, and `bootstrap`.

    The metrics are named `external_…` for a flat folder of two classes, `test_…` for the test split of a folder in the
    Kaggle layout. Of images without labels, the accuracy is estimated. Raises `UserError` for a model or a folder that
    cannot be used, or unreadable images.
    """
    found, bootstrap = _predicted(uri, config), config.bootstrap
    own = _own_tables(uri)
    if found.split == UNLABELLED:
        metrics, words = _estimated(own, found, bootstrap)
    else:
        prevalence = implied_prevalence(found.card.calibration, float(own["val"]["label"].mean())) if own else None
        report = evaluate(found.predictions, found.split, found.card.threshold, bootstrap, prevalence)
        report = report.about(found.card.task)
        metrics, words = _drop(own, found.predictions, found.split, bootstrap)
        words = [report.text(), *words]
    words += _seen(own, found.predictions)
    with open_run(f"evaluate-{found.root.name}") as tracker:
        _log_start(tracker, found, bootstrap)
        if uses := tracker.count({Tag.TEST_SPLIT: found.fingerprint}):
            words.append(f"these images were evaluated {uses} times before in this store")
        if found.split == UNLABELLED:
            tracker.table(found.predictions, predictions_path(found.split))
            tracker.metrics(metrics)
        else:
            tracker.tags({Tag.TEST_SPLIT: found.fingerprint})
            title = f"{uri} on {found.root.name}"
            figures = log_report(tracker, report, title)
            page = evaluation_page(title, report, figures, words[1:], uri)
            tracker.text(html_page(page), Artifact.REPORT)
            log_metrics(tracker, [report], metrics)
        tracker.tags({Tag.DESCRIPTION: "\n\n".join(words)})
        say("\n".join([*words, *(f"look: {where}" for where in tracker.where())]))


def _predicted(uri: str, config: TrainConfig) -> Predicted:
    predictor = registry.load(uri)
    card = predictor.card
    cache = Cache.open(config.cache_dir)
    memory = Memory.of(cache)
    root, indexed, split = to_evaluate(config, card.task, memory)
    found = read_headers(root, indexed, cache, config.paths, memory=memory)
    table, files = found.table.assign(group=list(found.groups.values())), list(found.files.values())
    store = open_store(files, list(table["digest"]), card.image_size, card.resize, cache, found.reading)
    if bad := bad_paths(table, store):
        hint = HIDDEN_HINT * found.reading.hidden
        raise UserError(f"{len(bad)} unreadable image(s) in {root}: {list_bad(bad)}; fix or remove them{hint}")
    table = table.assign(split=split)
    batches = eval_batches(make_split(table, store, split), 32, torch.device("cpu"))
    logits, familiarity = predictor.outputs(batches)
    predictions = predictions_table(table, logits, card.threshold, card.calibration, card.task)
    if familiarity is not None:
        predictions = with_selection(predictions, card.threshold, card.certainty_limit, familiarity)
    return Predicted(uri, card, root, table, split, predictions)


def _log_start(tracker: MlflowTracker, found: Predicted, bootstrap: int) -> None:
    names = {"model": found.uri, "data_dir": str(found.root), "bootstrap": str(bootstrap)}
    tracker.params({f"evaluate.{name}": value for name, value in names.items()})
    tags: dict[str, str] = {Tag.STRATEGY: found.card.strategy, Tag.KIND: RunKind.EVALUATION}
    tracker.tags({**tags, Tag.DATA_FINGERPRINT: found.fingerprint})
    tracker.dataset(found.table, found.root, found.split, "evaluation")


def _estimated(own: dict[str, pd.DataFrame], found: Predicted, bootstrap: int) -> tuple[dict[str, float], list[str]]:
    """(metrics, sentences) of images without labels."""
    if not own:
        raise UserError(
            f"--data-dir {found.root}: has no labels, and the run that logged the model cannot be read: its validation "
            f"is needed to estimate the accuracy; sort the images into folders {', '.join(found.card.task.classes)}"
        )
    threshold, val, new = found.card.threshold, own["val"], found.predictions
    sure = [certainties_of(table, threshold) for table in (val, new)]
    correct = np.asarray(val["decision"] == val["label"], np.int64)
    whole = (np.ones((1, len(val))), np.ones((1, len(new))))
    metrics = {"estimated_accuracy": float(estimated_accuracy(correct, sure[0], sure[1], whole)[0])}
    low, high = float("nan"), float("nan")
    if bootstrap:
        draws = tuple(group_weights(list(each["group"]), bootstrap, seed) for seed, each in enumerate((val, new)))
        found_draws = estimated_accuracy(correct, sure[0], sure[1], (draws[0], draws[1]))
        low, high = (float(value) for value in np.quantile(found_draws, [0.025, 0.975]))
        metrics |= {"estimated_accuracy_low": low, "estimated_accuracy_high": high}
    interval = format_interval((metrics["estimated_accuracy"], low, high))
    words = [
        f"{len(new)} images without labels; decisions: {_decisions(new, found.card.task)}",
        f"estimated accuracy {interval}: an estimate made on unlabelled images, from certainty alone "
        "(average-thresholded confidence); no model, epoch or threshold may be selected by it",
    ]
    if "abstain" in new:
        unsure, strange = float(new["abstain"].mean()), float((new["familiarity"] < UNFAMILIAR).mean())
        metrics |= {"unlabelled_abstained": unsure, "unlabelled_unfamiliar": strange}
        words.append(f"abstains from {unsure:.1%}; {strange:.1%} are unfamiliar (5% of validation)")
    return metrics, words


def _decisions(table: pd.DataFrame, task: Task) -> str:
    """How many images each class was decided for."""
    counts = np.bincount(table["decision"], minlength=len(task.classes))
    return ", ".join(f"{name} {count}" for name, count in zip(task.classes, counts, strict=True))


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
    aucs = [points_of(table)["roc_auc"] for table in (before, after)]
    metrics = {f"{split}_auc_drop": aucs[0] - aucs[1]}
    low, high = float("nan"), float("nan")
    if bootstrap:  # different images, so the two are resampled independently
        draws = [_auc_draws(table, bootstrap, seed) for seed, table in enumerate((before, after))]
        low, high = (float(value) for value in np.nanquantile(draws[0] - draws[1], [0.025, 0.975]))
        metrics |= {f"{split}_auc_drop_low": low, f"{split}_auc_drop_high": high}
    shares = [_shares(table) for table in (own["val"], before, after)]
    words = [
        f"ROC-AUC {aucs[0]:.4f} on the model's own test split, {aucs[1]:.4f} here: drop "
        f"{format_interval((aucs[0] - aucs[1], low, high))}",
        f"share of each class: {shares[0]} on validation, {shares[1]} on test, {shares[2]} here",
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
    known = predictions["group"] != predictions["path"]  # neither the header nor the file name tells other patients
    copies = int(predictions["digest"].isin(set(trained["digest"])).sum())
    seen = int((known & predictions["group"].isin(set(trained["group"]))).sum())
    head, tail = f"of {len(predictions)} images are", "these metrics are not a valid evaluation"
    words = []
    if copies:
        words.append(f"WARNING: {copies} {head} files that the model was trained or selected on: {tail}")
    if seen:
        words.append(f"WARNING: {seen} {head} of patients that the model was trained or selected on: {tail}")
    return words


def _calibration_words(before: pd.DataFrame, after: pd.DataFrame) -> str:
    eces = [points_of(table)["ece"] for table in (before, after)]
    return (
        f"calibration: ECE {eces[0]:.4f} on test, {eces[1]:.4f} here; mean probability of each class "
        f"{'/'.join(f'{share:.3f}' for share in matrix_of(after).mean(0))}"
    )


def _shares(table: pd.DataFrame) -> str:
    """The share of each class, such as 0.375/0.625."""
    counts = np.bincount(table["label"], minlength=len(classes_in(table)))
    return "/".join(f"{share:.3f}" for share in counts / len(table))


def _auc_draws(table: pd.DataFrame, resamples: int, seed: int) -> Floats:
    weights = group_weights(list(table["group"]), resamples, seed)
    return draws_of(table, weights)["roc_auc"]
