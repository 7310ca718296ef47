"""The lines that a run prints."""

from __future__ import annotations

from collections.abc import Callable

from cxr.config import TrainConfig
from cxr.data.load import Data
from cxr.evaluation.multiclass import PER_CLASS
from cxr.evaluation.report import Report, format_interval
from cxr.network.freezing import FreezeProof
from cxr.runs.result import RunResult
from cxr.strategies import STRATEGIES
from cxr.task import KAGGLE
from cxr.tracking import registry
from cxr.tracking.tracker import Tracker
from cxr.training.loop import EpochRecord
from cxr.training.reuse import ReusePlan

SPLIT_NAMES = {"val": "Validation", "test": "Test", "fold": "Held-out fold", "external": "External data"}
Say = Callable[[str], object]
Decisions = Callable[[Report], list[str]]
SATURATED = 0.99  # ROC-AUC on validation above which it hardly distinguishes models


def epoch_line(record: EpochRecord) -> str:
    """An epoch as one line for a terminal of 100 columns; the star marks the best so far."""
    m = record.metrics
    line = (
        f"epoch {record.epoch:2} {record.phase:4}  loss {m['train_loss']:.4f} / val {m['val_loss']:.4f}  "
        f"accuracy {m['train_accuracy']:.3f} / val {m['val_accuracy']:.3f} AUC {m['val_roc_auc']:.4f} "
        f"{m['images_per_second']:5.0f} img/s {m['epoch_seconds'] + m['eval_seconds']:5.1f} s"
    )
    return line + (" *" if record.improved else "")


def reuse_lines(plan: ReusePlan) -> list[str]:
    """What is kept of each phase's frozen stages, a line per phase; the views that are kept, if any."""
    lines = []
    for each in plan.phases:
        size = f" ({each.bytes / 1e6:.0f} MB)" if each.bytes else ""
        base = f", from the outputs of phase {each.base}" if each.base else ""
        lines.append(f"reuse, phase {each.phase}: {each.decision}{size}{base}")
    return [*lines, *(["reuse: augmented images are kept in memory"] if plan.keeps_views else [])]


def _proof_words(proof: FreezeProof) -> str:
    stages = ", ".join(proof.stages)
    return f"phase {proof.phase}: {stages} unchanged" if stages else f"phase {proof.phase}: nothing was frozen"


def _selective_line(report: Report) -> str:
    """What the model abstains from, and what it does not know."""
    found = report.selective
    rest = found.get("kept_accuracy", float("nan"))
    return (
        f"{report.split}: abstains from {found['abstained']:.1%} of the images, accuracy of the others {rest:.4f}; "
        f"{found['unfamiliar']:.1%} are unfamiliar (5% of validation)"
    )


def _average_lines(config: TrainConfig, result: RunResult) -> list[str]:
    """Whether the result is a mean of weights, where one was asked for."""
    if config.average == "none":
        return []
    steps = result.best.metrics.get("averaged_steps", 0)
    if steps:
        return [f"averaged: the weights are the mean over {steps:.0f} steps of phase {result.best.phase}"]
    return ["averaged: no; the best epoch came before the second one of the last phase"]


def _saturation_lines(result: RunResult) -> list[str]:
    """A warning where plain validation cannot tell good models from better ones."""
    auc, stressed = result.val.values["roc_auc"], result.stressed["stressed_val_roc_auc"]
    if auc <= SATURATED:
        return []
    return [
        f"note: validation is saturated (ROC-AUC {auc:.4f}, above {SATURATED}) and hardly distinguishes models; under "
        f"stress it is {stressed:.4f}. Compare stressed_val_loss"
    ]


def data_words(data: Data) -> str:
    """What the images are and how many are in each split."""
    counts = data.manifest["split"].value_counts()
    skipped = f", {len(data.bad)} unreadable images SKIPPED" if data.bad else ""
    sizes = ", ".join(f"{split} {counts[split]}" for split in ("train", "val", data.held_out))
    return f"{registry.DataKind.of(data.synthetic).version_tag}, {sizes} images{skipped}"


def decision_lines(report: Report) -> list[str]:
    """The main metrics: at both thresholds for two classes, over all and of each class for more."""
    name, shown = report.split, ("accuracy", "roc_auc", "recall", "specificity")
    main = ", ".join(f"{m} {format_interval(report.interval(m))}" for m in shown)
    if report.binary:
        chosen = ", ".join(f"{m} {format_interval(report.chosen_interval(m))}" for m in ("accuracy", *shown[2:]))
        rule = f"{report.threshold:.3f} ({report.origin})"
        return [f"{name}, threshold 0.5: {main}", f"{name}, threshold {rule}: {chosen}"]
    each = [
        f"{name}, {own}: " + ", ".join(f"{m} {format_interval(report.interval(f'{m}_of_{slug}'))}" for m in PER_CLASS)
        for own, slug in zip(report.task.classes, report.task.slugs, strict=True)
    ]
    return [f"{name}, the most probable class decides, means over classes: {main}", *each]


def decision_table(report: Report) -> list[str]:
    """The main metrics for a terminal of 100 columns: a column for each threshold; lines for more than two classes."""
    if not report.binary:
        return decision_lines(report)
    heads = (report.split, "threshold 0.5", f"threshold {report.threshold:.3f} ({report.origin})")
    rows = [heads]
    for name in ("roc_auc", "accuracy", "recall", "specificity"):
        chosen = "" if name == "roc_auc" else format_interval(report.chosen_interval(name))
        rows.append((name, format_interval(report.interval(name)), chosen))
    return ["", *(f"{name:<13} {plain:<27} {chosen}".rstrip() for name, plain, chosen in rows), ""]


def source_lines(data: Data) -> list[str]:
    """What must be said about a source: its classes, if they are not the usual ones, and its remarks."""
    return [*([] if data.task == KAGGLE else [f"classes: {data.task.words()}"]), *data.remarks]


def summary(config: TrainConfig, result: RunResult, decisions: Decisions = decision_lines) -> list[str]:
    """What is known at the end of a run: the result, its `decisions`, the data and weights."""
    best, test, weights = result.best, result.test, result.weights
    name, ece = test.split, (test.before["ece"], test.values["ece"])
    return [
        f"{config.strategy}, seed {config.seed}: best epoch {best.epoch} (phase {best.phase}) "
        f"of {len(result.records)}, val_loss {best.metrics['val_loss']:.4f}, "
        f"val ROC-AUC {format_interval(result.val.interval('roc_auc'))}",
        *decisions(test),
        f"calibration: {result.calibration.words()}; {name} ece {ece[0]:.4f} -> {ece[1]:.4f}",
        *(
            [f"this {name} split was evaluated {result.uses_before} times before in this store"]
            * (result.uses_before > 0)
        ),
        f"data: {data_words(result.data)}; fingerprint {result.data.fingerprint}",
        *source_lines(result.data),
        f"weights: {weights}" + ("; pretraining is what these strategies compare" if weights.random else ""),
        _selective_line(test),
        *_average_lines(config, result),
        *_saturation_lines(result),
        f"took: {result.seconds:.0f} s",
    ]


def links(config: TrainConfig, tracker: Tracker) -> list[str]:
    """Where to look, and what to run next."""
    others = [name for name in STRATEGIES if name != config.strategy]
    return [
        *(f"look: {where}" for where in tracker.where()),
        f"next: the same with --strategy {', '.join(others[:-1])} or {others[-1]}",
    ]
