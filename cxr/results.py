"""What a run gives back, and how it is told: to the tracker, to the registry, to a person."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.models import ResNet

from cxr import plots, registry
from cxr.calibration import IDENTITY, Calibration
from cxr.comparison_plots import calibration_pair
from cxr.config import TrainConfig
from cxr.data.audit import Finding
from cxr.data.augment import augment, view_parameters
from cxr.data.dataset import Split, make_split
from cxr.data.index import CLASS_TO_INDEX, CLASSES, fingerprint
from cxr.data.synthetic import phantom
from cxr.errors import UserError
from cxr.evaluate import HALF, Report, format_interval
from cxr.inputs import Data, Machine
from cxr.model import count_parameters
from cxr.predictor import ModelCard
from cxr.runtime import describe, processes
from cxr.strategies import STRATEGIES
from cxr.tracking import MlflowTracker, Tracker, git_commit
from cxr.train import EpochRecord, FreezeProof

TEST_SPLIT = "test_split"  # the tag by which the uses of a test split are counted
SPLIT_NAMES = {"val": "Validation", "test": "Test", "fold": "Held-out fold", "external": "External data"}
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run gives back: which weights it really started from, its epochs, and the two reports.

    `stressed` are the figures of the stressed validation; `uses_before` says how often this test split was evaluated
    before in the tracking store.
    """

    run_id: str
    weights: str
    records: list[EpochRecord]
    val: Report
    test: Report
    data: Data
    seconds: float
    peak_memory: float
    calibration: Calibration
    stressed: dict[str, float]
    uses_before: int = 0
    registered: str = "not registered"

    @property
    def history(self) -> pd.DataFrame:
        """One row for each epoch."""
        return pd.DataFrame([record.row() for record in self.records])

    @property
    def best(self) -> EpochRecord:
        """The epoch whose checkpoint is the result: the lowest validation loss over all phases."""
        return [record for record in self.records if record.improved][-1]

    @property
    def proofs(self) -> list[FreezeProof]:
        """One for each phase."""
        return [record.proof for record in self.records if record.proof]


def log_start(
    config: TrainConfig, tracker: Tracker, data: Data, machine: Machine, weights: str, findings: list[Finding]
) -> None:
    """What is known before training: tags, configuration, audit, manifest, data sets.

    Raises `UserError` when a resumed run would go on with other data, weights or precision than it began with.
    """
    origin = {"data_fingerprint": data.fingerprint, "weights_used": weights, "precision": machine.precision}
    _require_same(tracker, origin)
    tracker.tags(
        {
            "strategy": config.strategy,
            "arch": config.arch,
            "seed": str(config.seed),
            "data": "synthetic phantoms" if data.synthetic else "X-rays",
            "data_fingerprint": data.fingerprint,
            "weights_used": weights,
            "device": describe(machine.device),
            "precision": machine.precision,
            "processes": str(processes()),
            "git_commit": git_commit(),
            "images_skipped": str(len(data.bad)),
            "audit": "; ".join(finding.check for finding in findings if not finding.ok) or "nothing found",
            "audit_untold": "; ".join(finding.check for finding in findings if not finding.told) or "none",
        }
    )
    tracker.text(json.dumps(asdict(config), indent=2) + "\n", "config.json")
    tracker.text("\n".join(finding.line() for finding in findings) + "\n", "data/audit.txt")
    tracker.table(data.manifest, "data/manifest.csv")
    for split, context in (("train", "training"), ("val", "validation"), (data.held_out, "testing")):
        tracker.dataset(data.part(split), str(data.root), f"{data.fingerprint}-{split}", context)


def _require_same(tracker: Tracker, origin: dict[str, str]) -> None:
    """Raise `UserError` when a resumed run would go on from something else than it began with."""
    for name, value in origin.items():
        before = tracker.recorded_tags().get(name, value)
        if before != value:
            raise UserError(f"--resume {tracker.run_id}: {name} was {before} and is {value} now; start a new run")


def epoch_line(record: EpochRecord) -> str:
    """An epoch for people; the star marks the best so far."""
    m = record.metrics
    line = (
        f"epoch {record.epoch:2} {record.phase:4}  loss {m['train_loss']:.4f} / val {m['val_loss']:.4f}  "
        f"accuracy {m['train_accuracy']:.3f} / val {m['val_accuracy']:.3f}  val AUC {m['val_roc_auc']:.4f}  "
        f"{m['images_per_second']:.0f} img/s  {m['epoch_seconds'] + m['eval_seconds']:.1f} s"
    )
    return line + ("  *" if record.improved else "")


def views_figure(config: TrainConfig, train: Split) -> Figure:
    """Six training images, each as it is and as its first views."""
    shown = np.linspace(0, len(train) - 1, 6).astype(np.int64)
    images = torch.from_numpy(train.dataset.images[train.dataset.rows[shown]])
    rows, captions = [images], ["as it is"] * 6
    for view in range(min(config.views, 2)):
        parameters = torch.from_numpy(view_parameters(config.seed, train.keys[shown], view))
        rows.append(augment(images, parameters).byte())
        captions += [f"view {view}"] * 6
    return plots.image_grid(torch.cat(rows).numpy(), captions, "What the network sees in training")


def log_end(config: TrainConfig, tracker: Tracker, model: ResNet, result: RunResult) -> str:
    """Reports, figures, proofs, the model, and what a person should know. Returns what the registry made of it."""
    name, best = f"{config.strategy}, seed {config.seed}", result.best.epoch
    tracker.table(result.history, "tables/history.csv")
    tracker.figure(plots.learning_curves(result.history, best, f"Learning curves: {name}"), "plots/learning_curves.png")
    tracker.text(json.dumps([asdict(proof) for proof in result.proofs], indent=2) + "\n", "freeze_proofs.json")
    for report in (result.val, result.test):
        log_report(tracker, report, name)
    tracker.figure(_explained(model, result, name), "plots/test_gradcam.png")
    sizes = {
        "parameters_total": count_parameters(model),
        "parameters_trained": count_parameters(model, config.phases[-1].trainable),
    }
    model_id = _log_model(config, tracker, model, result)
    registration = _register(config, tracker, model_id, result)
    if not tracker.logged(f"{result.test.split}_roc_auc"):
        # After the last epoch's step, so that `val_accuracy` of the result neither hides in nor doubles an epoch's.
        gap = {"val_test_gap_roc_auc": result.val.values["roc_auc"] - result.test.values["roc_auc"]}
        final = {**result.val.figures(), **result.test.figures(), **result.stressed, **gap, **sizes}
        final |= {"chosen_threshold": result.test.threshold, "test_uses_before": result.uses_before}
        final |= {"total_seconds": result.seconds, "peak_memory_mb": result.peak_memory}
        tracker.metrics(final, step=len(result.records), model_id=model_id)
    tracker.tags(
        {
            "freezing": "; ".join(_proof_words(proof) for proof in result.proofs),
            "best_epoch": str(best),
            "registered": registration,
            "calibration": result.calibration.words(),
            "mlflow.note.content": "\n\n".join([*summary(config, tracker, result), registration]),
        }
    )
    return registration


def _explained(model: ResNet, result: RunResult, name: str) -> Figure:
    """Grad-CAM of confident right, confident wrong and borderline images of the held-out split."""
    from cxr.explain import choose_examples, examples_panel  # captum costs half a second, and only the end needs it

    split = make_split(result.data.manifest, result.data.store, result.data.held_out)
    chosen = choose_examples(result.test.table, result.test.threshold)
    images = split.dataset.images[split.dataset.rows[chosen.index]]
    return examples_panel(model, images, chosen, f"{SPLIT_NAMES[result.test.split]} images, Grad-CAM: {name}")


def card_of(
    config: TrainConfig,
    weights: str,
    data_fingerprint: str,
    threshold: float = HALF,
    calibration: Calibration = IDENTITY,
) -> ModelCard:
    """What goes with the weights of a run."""
    return ModelCard(
        arch=config.arch,
        image_size=config.image_size,
        resize=config.resize,
        threshold=threshold,
        strategy=config.strategy,
        data_fingerprint=data_fingerprint,
        weights=weights,
        class_to_index=CLASS_TO_INDEX,
        calibration=calibration,
    )


def _log_model(config: TrainConfig, tracker: Tracker, model: ResNet, result: RunResult) -> str | None:
    if not isinstance(tracker, MlflowTracker):
        return None
    card = card_of(config, result.weights, result.data.fingerprint, result.test.threshold, result.calibration)
    return registry.log_model(model.state_dict(), card, _example(config.image_size))


def _register(config: TrainConfig, tracker: Tracker, model_id: str | None, result: RunResult) -> str:
    """What became of the model in the registry, in words."""
    if model_id is None or config.register == "none":
        return "not registered"
    val = result.data.part("val")
    tags = {
        "run_id": tracker.run_id,
        "strategy": config.strategy,
        "arch": config.arch,
        "weights": result.weights,
        "data": _kind_words(result.data),
        "data_fingerprint": result.data.fingerprint,
        "val_fingerprint": fingerprint(val),
        "val_loss": repr(result.best.metrics["val_loss"]),
        "stressed_val_loss": repr(result.stressed["stressed_val_loss"]),
        "selected_by": config.select,
        "val_roc_auc": repr(result.val.values["roc_auc"]),
        "threshold": repr(result.test.threshold),
        "calibration": result.calibration.words(),
        "class_to_index": json.dumps(CLASS_TO_INDEX),
        "preprocessing": f"grey, {config.resize} to {config.image_size}x{config.image_size}, ImageNet mean and std",
    }
    return registry.register(model_id, config.register, tags).line()


def _proof_words(proof: FreezeProof) -> str:
    stages = ", ".join(proof.stages)
    return f"phase {proof.phase}: {stages} unchanged" if stages else f"phase {proof.phase}: nothing was frozen"


def log_report(tracker: Tracker, report: Report, name: str) -> None:
    """The predictions, the report and the figures of one split; `name` says whose they are."""
    split, labels, probabilities = report.split, report.labels, report.probabilities
    title = f"{SPLIT_NAMES[split]}: {name}"
    tracker.table(report.table, f"tables/{split}_predictions.csv")
    tracker.text(report.text(), f"reports/{split}.txt")
    figures = {
        "confusion_matrix": plots.confusion_matrix(report.counts(), CLASSES, title),
        "roc": plots.roc_curve(labels, probabilities, report.interval("roc_auc"), title, report.threshold),
        "pr": plots.pr_curve(labels, probabilities, report.interval("pr_auc"), title, report.threshold),
        "confusion_matrix_chosen": plots.confusion_matrix(
            report.counts(report.threshold), CLASSES, f"{title}, threshold {report.threshold:.3f}"
        ),
        "reliability": calibration_pair(labels, report.uncalibrated, probabilities, title),
        "metrics": plots.metric_bars({m: report.interval(m) for m in report.values if m != "log_loss"}, title),
    }
    for kind, figure in figures.items():
        tracker.figure(figure, f"plots/{split}_{kind}.png")


def _example(size: int) -> bytes:
    """A phantom as PNG: a patient's image has no place in a model's files."""
    buffer = io.BytesIO()
    Image.fromarray(phantom(np.random.default_rng(0), "normal", size)).save(buffer, "PNG")
    return buffer.getvalue()


def data_words(data: Data) -> str:
    """What the images are and how many in each split, for people."""
    counts = data.manifest["split"].value_counts()
    skipped = f", {len(data.bad)} unreadable images SKIPPED" if data.bad else ""
    sizes = ", ".join(f"{split} {counts[split]}" for split in ("train", "val", data.held_out))
    return f"{_kind_words(data)}, {sizes} images{skipped}"


def _kind_words(data: Data) -> str:
    return f"synthetic {registry.PHANTOMS} (NOT real X-rays)" if data.synthetic else "X-rays"


def summary(config: TrainConfig, tracker: Tracker, result: RunResult) -> list[str]:
    """Lines for a person: what came out, on what, where to look, what to run next."""
    best, test, weights = result.best, result.test, result.weights
    name, ece = test.split, (test.before["ece"], test.values["ece"])
    shown = ("accuracy", "roc_auc", "recall", "specificity")
    others = [name for name in STRATEGIES if name != config.strategy]
    return [
        f"{config.strategy}, seed {config.seed}: best epoch {best.epoch} (phase {best.phase}) "
        f"of {len(result.records)}, val_loss {best.metrics['val_loss']:.4f}, "
        f"val ROC-AUC {format_interval(result.val.interval('roc_auc'))}",
        f"{name}, threshold 0.5: " + ", ".join(f"{m} {format_interval(test.interval(m))}" for m in shown),
        f"{name}, threshold {test.threshold:.3f} ({test.origin}): "
        + ", ".join(f"{m} {format_interval(test.chosen_interval(m))}" for m in ("accuracy", *shown[2:])),
        f"calibration: {result.calibration.words()}; {name} ece {ece[0]:.4f} -> {ece[1]:.4f}",
        *(
            [f"this {name} split was evaluated {result.uses_before} times before in this store"]
            * (result.uses_before > 0)
        ),
        f"data: {data_words(result.data)}; fingerprint {result.data.fingerprint}",
        f"weights: {weights}"
        + ("; pretraining is what these strategies compare" if weights.startswith("random") else ""),
        f"took: {result.seconds:.0f} s",
        *(f"look: {where}" for where in tracker.where()),
        f"next: the same with --strategy {', '.join(others[:-1])} or {others[-1]}",
    ]
