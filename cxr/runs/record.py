"""What a training run logs: before training, after it, and to the model registry."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from cxr.audit.checks import Finding
from cxr.config import TrainConfig
from cxr.data.batches import Split, make_split
from cxr.data.load import Data
from cxr.data.phantoms import phantom
from cxr.data.splits import fingerprint
from cxr.data.views import augment, view_parameters
from cxr.errors import UserError
from cxr.evaluation.calibration import IDENTITY, Calibration
from cxr.evaluation.metrics import range_of
from cxr.evaluation.predictions import HALF, matrix_of
from cxr.evaluation.report import Report, at_first_sight, certainties_of
from cxr.evaluation.selective import COVERAGES, selective_accuracy
from cxr.figures import single as plots
from cxr.figures.classes import roc_curves
from cxr.figures.html import html_page
from cxr.figures.single import calibration_pair
from cxr.machine import Machine, describe, processes
from cxr.network.freezing import count_parameters
from cxr.network.weights import InitialWeights
from cxr.runs.messages import SPLIT_NAMES, _proof_words, links, summary
from cxr.runs.page import training_page
from cxr.runs.result import RunResult
from cxr.serving.predictor import ModelCard
from cxr.tracking import registry
from cxr.tracking.cards import described
from cxr.tracking.lifecycle import git_commit
from cxr.tracking.reading import Artifact, Tag, metrics_table, plot_path, predictions_path, report_path
from cxr.tracking.tracker import MlflowTracker, Tracker

STRESSED = "stressed_val_loss"
FEW = {"confusion_matrix", "roc"}  # of the held-out split; with `figures=few`, validation has none
SELECTIVE_RESAMPLES = 500  # a band in a figure needs fewer than an interval in a table


def log_start(
    config: TrainConfig,
    tracker: Tracker,
    data: Data,
    machine: Machine,
    weights: InitialWeights,
    findings: list[Finding],
) -> None:
    """Log what is known before training: tags, configuration, audit, manifest, datasets.

    Raises `UserError` if a resumed run would continue with different data, weights or precision.
    """
    origin: dict[str, str] = {
        Tag.DATA_FINGERPRINT: data.fingerprint,
        Tag.WEIGHTS: str(weights),
        Tag.PRECISION: machine.precision,
        Tag.CLASSES: json.dumps(data.task.classes),
    }
    _require_same(tracker, origin)
    tracker.tags(
        {
            Tag.STRATEGY: config.strategy,
            Tag.ARCH: config.arch,
            Tag.SEED: str(config.seed),
            Tag.DATA: registry.DataKind.of(data.synthetic),
            **origin,
            Tag.DEPTH: str(data.depth),
            Tag.DEVICE: describe(machine.device),
            Tag.PROCESSES: str(processes()),
            Tag.COMMIT: git_commit(),
            Tag.IMAGES_SKIPPED: str(len(data.bad)),
            Tag.AUDIT: "; ".join(finding.check for finding in findings if not finding.ok) or "nothing found",
            Tag.AUDIT_INCONCLUSIVE: "; ".join(finding.check for finding in findings if not finding.conclusive)
            or "none",
        }
    )
    tracker.text(json.dumps(asdict(config), indent=2) + "\n", Artifact.CONFIG)
    tracker.text("\n".join(finding.line() for finding in findings) + "\n", Artifact.AUDIT)
    tracker.table(data.manifest, Artifact.MANIFEST)
    note_data(tracker, data)


def note_data(tracker: Tracker, data: Data) -> None:
    """Note which images a run uses, and for what."""
    for split, context in (("train", "training"), ("val", "validation"), (data.held_out, "testing")):
        tracker.dataset(data.part(split), data.root, split, context)


def _require_same(tracker: Tracker, origin: Mapping[str, str]) -> None:
    """Raise `UserError` if a resumed run would continue with different data, weights or precision."""
    for name, value in origin.items():
        before = tracker.recorded_tags().get(name, value)
        if before != value:
            raise UserError(f"--resume {tracker.run_id}: {name} was {before}, now {value}; start a new run")


def views_figure(config: TrainConfig, train: Split) -> Figure:
    """Six training images, each unaugmented and as its first two views."""
    shown = np.linspace(0, len(train) - 1, 6).astype(np.int64)
    images = torch.from_numpy(train.dataset.images[train.dataset.rows[shown]])
    rows, captions = [images], ["original"] * 6
    for view in range(min(config.views, 2)):
        parameters = torch.from_numpy(view_parameters(config.seed, train.keys[shown], view, config.augment))
        rows.append(augment(images, parameters).byte())
        captions += [f"view {view}"] * 6
    return plots.image_grid(torch.cat(rows).numpy(), captions, "What the network sees in training")


def log_end(config: TrainConfig, tracker: Tracker, model: nn.Module, result: RunResult) -> str:
    """Reports, figures, proofs, the model, and what a person should know. Returns what the registry made of it."""
    name, best = f"{config.strategy}, seed {config.seed}", result.best.epoch
    tracker.table(result.history, Artifact.HISTORY)
    figures = {"learning_curves": plots.learning_curves(result.history, best, f"Learning curves: {name}")}
    tracker.figure(figures["learning_curves"], Artifact.LEARNING_CURVES)
    tracker.text(json.dumps([asdict(proof) for proof in result.proofs], indent=2) + "\n", Artifact.FREEZE_PROOFS)
    few = config.figures == "few"
    log_report(tracker, result.val, name, set() if few else None)
    figures |= log_report(tracker, result.test, name, FEW if few else None)
    figures["gradcam"] = _gradcam_panel(model, result, name)
    tracker.figure(figures["gradcam"], Artifact.GRADCAM)
    sizes = {
        "parameters_total": count_parameters(model),
        "parameters_trained": count_parameters(model, config.phases[-1].trainable),
    }
    model_id = _log_model(config, tracker, model, result)
    if not tracker.logged(f"{result.test.split}_roc_auc"):
        # After the last epoch's step, so that `val_accuracy` of the result neither hides in nor doubles an epoch's.
        gap = {"val_test_gap_roc_auc": result.val.values["roc_auc"] - result.test.values["roc_auc"]}
        final = {**result.stressed, **gap, **sizes, "test_uses_before": result.uses_before}
        final |= {"chosen_threshold": result.test.threshold} if result.data.task.binary else {}
        final |= {"total_seconds": result.seconds, "peak_memory_mb": result.peak_memory}
        log_metrics(tracker, (result.val, result.test), final, len(result.records), model_id)
    tracker.drain()  # the card of a registered version quotes the metrics from the store
    registration = _register(config, tracker, model_id, result)
    if isinstance(tracker, MlflowTracker):
        page = training_page(config, result, figures, model_id, registration)
        tracker.text(html_page(page), Artifact.REPORT)
    tracker.tags(
        {
            Tag.FREEZING: "; ".join(_proof_words(proof) for proof in result.proofs),
            Tag.BEST_EPOCH: str(best),
            Tag.REGISTERED: registration,
            Tag.CALIBRATION: result.calibration.words(),
            Tag.DESCRIPTION: "\n\n".join([*summary(config, result), registration, *links(config, tracker)]),
        }
    )
    return registration


def log_metrics(
    tracker: Tracker,
    reports: Sequence[Report],
    others: Mapping[str, float],
    step: int | None = None,
    model_id: str | None = None,
) -> None:
    """Log the metrics of reports and `others`: all in a table, and those that are looked for first as metrics."""
    own = {name: value for report in reports for name, value in report.metrics().items()}
    every = {**own, **others}
    tracker.table(metrics_table(every), Artifact.METRICS)
    tracker.metrics(at_first_sight(every, reports), step=step, model_id=model_id)


def _gradcam_panel(model: nn.Module, result: RunResult, name: str) -> Figure:
    """Grad-CAM of confident right, confident wrong and borderline images of the held-out split."""
    from cxr.figures.examples import (  # captum costs half a second, and only the end needs it
        choose_examples,
        examples_panel,
    )

    split = make_split(result.data.manifest, result.data.store, result.data.held_out)
    task = result.data.task
    chosen = choose_examples(result.test.table, result.test.threshold if task.binary else None)
    images = split.dataset.images[split.dataset.rows[chosen.index]]
    return examples_panel(model, images, chosen, f"{SPLIT_NAMES[result.test.split]} images, Grad-CAM: {name}", task)


def card_of(
    config: TrainConfig,
    weights: InitialWeights,
    data: Data,
    threshold: float = HALF,
    calibration: Calibration = IDENTITY,
    certainty_limit: float = 0.0,
) -> ModelCard:
    """What goes with the weights of a run."""
    return ModelCard(
        arch=config.arch,
        image_size=config.image_size,
        resize=config.resize,
        threshold=threshold,
        strategy=config.strategy,
        data_fingerprint=data.fingerprint,
        weights=str(weights),
        class_to_index=data.task.class_to_index,
        calibration=calibration,
        certainty_limit=certainty_limit,
        depth=data.depth,
    )


def _log_model(config: TrainConfig, tracker: Tracker, model: nn.Module, result: RunResult) -> str | None:
    if not isinstance(tracker, MlflowTracker):
        return None
    card, example = _card(config, result), example_of(config.image_size)
    return registry.log_model(model.state_dict(), card, example, result.reports.familiar)


def _register(config: TrainConfig, tracker: Tracker, model_id: str | None, result: RunResult) -> str:
    """Register the model; returns a line that says what became of it."""
    if model_id is None or config.register == "none":
        return "not registered"
    losses = {name: values[name] for name, values in (("val_loss", result.best.metrics), (STRESSED, result.stressed))}
    card = _card(config, result)
    tags = version_tags(tracker.run_id, config, result.data, card, result.val, losses)
    registration = registry.register(model_id, config.register, tags)
    return described(registration, card, tracker.run_id, model_id).line()


def version_tags(
    run_id: str, config: TrainConfig, data: Data, card: ModelCard, val: Report, losses: Mapping[str, float]
) -> dict[str, str]:
    """The tags of a registered version; `losses` are those by which versions may be compared."""
    return {
        "run_id": run_id,
        "strategy": card.strategy,
        "arch": card.arch,
        "weights": card.weights,
        "data": registry.DataKind.of(data.synthetic).version_tag,
        "data_fingerprint": data.fingerprint,
        "val_fingerprint": fingerprint(data.part("val")),
        **{name: repr(loss) for name, loss in losses.items()},
        "selected_by": config.select,
        "augment": config.augment if config.views else "none",
        "stresses": config.stresses,
        "val_roc_auc": repr(val.values["roc_auc"]),
        "threshold": repr(card.threshold),
        "calibration": card.calibration.words(),
        "class_to_index": json.dumps(card.class_to_index),
        "positive": card.task.positive or "none",
        "preprocessing": f"grey, {card.resize} to {card.image_size}x{card.image_size}, ImageNet mean and std",
        "members": str(card.members),
    }


def _card(config: TrainConfig, result: RunResult) -> ModelCard:
    limit = result.reports.certainty_limit
    return card_of(config, result.weights, result.data, result.test.threshold, result.calibration, limit)


def log_report(tracker: Tracker, report: Report, name: str, kinds: Set[str] | None = None) -> dict[str, Figure]:
    """Log the predictions, the report and the figures of one split (of these `kinds`, if given); `name` goes into their
    titles.

    Returns the figures by the names of their files, without the split.
    """
    split, title = report.split, f"{SPLIT_NAMES[report.split]}: {name}"
    tracker.table(report.table, predictions_path(split))
    tracker.text(report.text(), report_path(split))
    figures = report_figures(report, title, kinds)
    for kind, figure in figures.items():
        tracker.figure(figure, plot_path(f"{split}_{kind}"))
    return figures


def report_figures(report: Report, title: str, kinds: Set[str] | None = None) -> dict[str, Figure]:
    """Name -> figure, of one split; only those of `kinds` are drawn, if given."""
    ways = _ways_to_draw(report, title) | (
        _binary_only(report, title) if report.binary else _classes_only(report, title)
    )
    return {kind: draw() for kind, draw in ways.items() if kinds is None or kind in kinds}


_Ways = dict[str, Callable[[], Figure]]


def _ways_to_draw(report: Report, title: str) -> _Ways:
    """Name -> what draws the figure, of those that every report has."""
    shown = {metric: report.interval(metric) for metric in report.values if range_of(metric) == (0, 1)}
    ways: _Ways = {
        "confusion_matrix": lambda: plots.confusion_matrix(report.counts(), report.task.classes, title),
        "metrics": lambda: plots.metric_bars(shown, title),
    }
    return ways | ({"selective": lambda: _selective_figure(report, title)} if "abstain" in report.table else {})


def _classes_only(report: Report, title: str) -> _Ways:
    areas = [report.interval(f"roc_auc_of_{slug}") for slug in report.task.slugs]
    named, event = list(zip(report.task.classes, areas, strict=True)), "the decision being right"
    return {
        "roc": lambda: roc_curves(report.labels, matrix_of(report.table), named, title),
        "reliability": lambda: calibration_pair(
            report.correct, report.uncalibrated, report.probabilities, title, event=event
        ),
    }


def _binary_only(report: Report, title: str) -> _Ways:
    labels, probabilities, threshold = report.labels, report.probabilities, report.threshold
    chosen = f"{title}, threshold {threshold:.3f}"
    return {
        "roc": lambda: plots.roc_curve(labels, probabilities, report.interval("roc_auc"), title, threshold),
        "pr": lambda: plots.pr_curve(labels, probabilities, report.interval("pr_auc"), title, threshold),
        "confusion_matrix_chosen": lambda: plots.confusion_matrix(
            report.counts(threshold), report.task.classes, chosen
        ),
        "reliability": lambda: calibration_pair(labels, report.uncalibrated, probabilities, title),
    }


def _selective_figure(report: Report, title: str) -> Figure:
    sure = certainties_of(report.table, report.threshold)
    resamples = SELECTIVE_RESAMPLES if np.isfinite(report.bounds["accuracy"]).all() else 0
    found = selective_accuracy(report.correct, sure, list(report.table["group"]), resamples)
    curve = {"accuracy": found.accuracy, "low": found.low, "high": found.high}
    return plots.selective_accuracy(COVERAGES, curve, report.selective["abstained"], f"Selective accuracy, {title}")


def example_of(size: int) -> bytes:
    """A phantom as PNG: a patient's image has no place in a model's files."""
    buffer = io.BytesIO()
    Image.fromarray(phantom(np.random.default_rng(0), "normal", size)).save(buffer, "PNG")
    return buffer.getvalue()
