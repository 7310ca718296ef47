"""One run from configuration to result: data, training, evaluation, artifacts. The only place that sees it all."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.models import ResNet
from tqdm import tqdm

from cxr import plots, registry
from cxr.activations import Activations
from cxr.checkpoint import LAST, Checkpoints, exclusive
from cxr.config import SYNTHETIC, TrainConfig, flatten, types_of, unflatten
from cxr.data.audit import audit, list_bad, reject_bad
from cxr.data.augment import augment, view_parameters
from cxr.data.dataset import Split, eval_batches, make_split
from cxr.data.index import (
    CLASS_TO_INDEX,
    CLASSES,
    assign_splits,
    find_root,
    fingerprint,
    index_folder,
    index_for_evaluation,
)
from cxr.data.store import Store, open_store
from cxr.data.synthetic import VERSION, phantom, write_synthetic
from cxr.errors import UserError
from cxr.evaluate import Report, evaluate, format_interval, predictions_table
from cxr.model import build_model, count_parameters
from cxr.predictor import ModelCard
from cxr.runtime import (
    cache_folder,
    cpu_has_bf16,
    describe,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from cxr.strategies import STRATEGIES
from cxr.tracking import MlflowTracker, Tracker, existing_run, git_commit, open_run, recorded
from cxr.train import EpochRecord, FreezeProof, Schedule, class_weights, fit, infer

THRESHOLD = 0.5
SPLIT_NAMES = {"val": "Validation", "test": "Test", "external": "External data"}
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Data:
    """A data set ready to train on: the manifest (bad images left out), the decoded images, and their origin."""

    manifest: pd.DataFrame
    store: Store
    bad: dict[str, str]
    root: Path
    fingerprint: str
    synthetic: bool

    def part(self, split: str) -> pd.DataFrame:
        """The manifest's rows of one split."""
        return self.manifest[self.manifest["split"] == split]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and how to compute."""

    device: torch.device
    precision: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run gives back: which weights it really started from, its epochs, and the two reports."""

    run_id: str
    weights: str
    records: list[EpochRecord]
    val: Report
    test: Report
    data: Data
    seconds: float
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


def read_data(config: TrainConfig) -> Data:
    """Index, decode and split. Raises `UserError` for a folder or files that cannot be used."""
    cache = cache_folder(config.cache_dir)
    synthetic = config.data_dir == SYNTHETIC
    root = find_root(write_synthetic(cache / f"synthetic-{VERSION}") if synthetic else config.data_dir)
    table = index_folder(root)
    files = [root / path for path in table["path"]]
    store = open_store(files, list(table["digest"]), config.image_size, config.resize, cache)
    bad = _bad_paths(table, store)
    table = reject_bad(table, bad, config.on_bad_image)
    manifest = assign_splits(table, config.val_split, config.val_fraction, config.split_seed)
    shapes = [store.shapes[digest] for digest in manifest["digest"]]
    manifest[["width", "height", "mode"]] = pd.DataFrame(shapes, index=manifest.index)
    return Data(manifest, store, bad, root, fingerprint(manifest), synthetic)


def run(config: TrainConfig, tracker: Tracker, say: Say = print) -> RunResult:
    """Train by `config`, evaluate the best checkpoint on validation and, once, on test; log all of it."""
    started = time.perf_counter()
    tracker.params(flatten(replace(config, resume="none")))  # first of all: a resume reads them
    machine = _ready_machine(config)
    data = read_data(config)
    model, weights = build_model(config.arch, config.weights, config.seed)
    model.to(device=machine.device, memory_format=torch.channels_last)
    _log_start(config, tracker, data, machine, weights)
    say(f"data: {_data_words(data)}\nstart: {config.arch}, weights {weights}, on {describe(machine.device)}")
    records = _train(config, tracker, data, machine, model, say)
    val, test = (_report(config, data, machine, model, split) for split in ("val", "test"))
    result = RunResult(tracker.run_id, weights, records, val, test, data, time.perf_counter() - started)
    return replace(result, registered=_log_end(config, tracker, model, result))


def run_tracked(config: TrainConfig, say: Say = print) -> RunResult:
    """`run` in MLflow: a new run, the one that `mlflow run` opened, or the one to resume.

    A run that is resumed goes on with the parameters it recorded. Its checkpoints are removed once it is finished.
    Raises `UserError` also when the run to resume is unknown, finished, or in use by another process.
    """
    run_id = existing_run(config.resume)
    if run_id:
        config = _recorded_config(run_id, config)
    with ExitStack() as stack:
        if run_id:  # before it is opened: a run that another process trains must not be touched
            stack.enter_context(exclusive(checkpoint_folder(config, run_id)))
        tracker = stack.enter_context(open_run(f"{config.strategy}-s{config.seed}", run_id=run_id))
        if not run_id:
            stack.enter_context(exclusive(checkpoint_folder(config, tracker.run_id)))
        result = run(config, tracker, say)
        lines = [*summary(config, tracker, result), result.registered]
    shutil.rmtree(checkpoint_folder(config, tracker.run_id))
    say("\n" + "\n".join(lines))
    return result


def _recorded_config(run_id: str, config: TrainConfig) -> TrainConfig:
    """The configuration that a run recorded; `config` when it is one that `mlflow run` has only just opened.

    A run that was stopped before it recorded ours has those that `mlflow run` logged, under plain names.
    """
    known, names = recorded(run_id), types_of(TrainConfig).keys() - {"resume"}
    ours = {key: value for key, value in known.items() if key.startswith("train.")}
    if not ours and config.resume == "none":
        return config
    ours = ours or {f"train.{key}": value for key, value in known.items() if key in names}
    if "train.data_dir" not in ours:
        raise UserError(f"--resume {run_id}: it recorded no parameters of a training run; start a new one")
    try:
        return unflatten(ours)
    except ValueError as error:
        raise UserError(f"--resume {run_id}: its parameters cannot be read ({error}); start a new run") from error


def evaluate_tracked(uri: str, data_dir: str, bootstrap: int, cache_dir: str, say: Say = print) -> Report:
    """Evaluate a logged or registered model on other images, in an MLflow run of its own.

    The figures are named `external_…` for a flat folder of two classes, `test_…` for the test split of a Kaggle-shaped
    one. Raises `UserError` for a model or a folder that cannot be used, or unreadable images.
    """
    predictor = registry.load(uri)
    card = predictor.card
    root, table, split = index_for_evaluation(data_dir)
    files = [root / path for path in table["path"]]
    store = open_store(files, list(table["digest"]), card.image_size, card.resize, cache_folder(cache_dir))
    if bad := _bad_paths(table, store):
        raise UserError(f"{len(bad)} unreadable image(s) in {root}: {list_bad(bad)}; mend or remove them")
    table = table.assign(split=split)
    logits, _ = infer(predictor.model, eval_batches(make_split(table, store, split), 32, torch.device("cpu")))
    report = evaluate(predictions_table(table, logits.numpy(), card.threshold), split, card.threshold, bootstrap)
    with open_run(f"evaluate-{root.name}") as tracker:
        tracker.params({"evaluate.model": uri, "evaluate.data_dir": str(root), "evaluate.bootstrap": str(bootstrap)})
        tracker.tags({"strategy": card.strategy, "data_fingerprint": fingerprint(table)})
        tracker.dataset(table, str(root), f"{fingerprint(table)}-{split}", "evaluation")
        _log_report(tracker, report, f"{uri} on {root.name}")
        tracker.metrics(report.figures())
        say("\n".join([report.text(), *(f"look: {where}" for where in tracker.where())]))
    return report


def _bad_paths(table: pd.DataFrame, store: Store) -> dict[str, str]:
    """Path -> reason, of the images that the store could not decode."""
    return {p: store.bad[d] for p, d in zip(table["path"], table["digest"], strict=True) if d in store.bad}


def _ready_machine(config: TrainConfig) -> Machine:
    device = resolve_device(config.device)
    machine = Machine(device, resolve_precision(config.precision, device))
    seed_everything(config.seed, device)
    return machine


def checkpoint_folder(config: TrainConfig, run_id: str) -> Path:
    """Where the run's checkpoints are."""
    return cache_folder(config.cache_dir) / "runs" / run_id


def _log_start(config: TrainConfig, tracker: Tracker, data: Data, machine: Machine, weights: str) -> None:
    _require_same(tracker, {"data_fingerprint": data.fingerprint, "weights_used": weights})
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
            "git_commit": git_commit(),
            "images_skipped": str(len(data.bad)),
        }
    )
    tracker.text(json.dumps(asdict(config), indent=2) + "\n", "config.json")
    tracker.text("\n".join(f.line() for f in audit(data.manifest, data.bad)) + "\n", "data/audit.txt")
    tracker.table(data.manifest, "data/manifest.csv")
    for split, context in (("train", "training"), ("val", "validation"), ("test", "testing")):
        tracker.dataset(data.part(split), str(data.root), f"{data.fingerprint}-{split}", context)


def _require_same(tracker: Tracker, origin: dict[str, str]) -> None:
    """Raise `UserError` when a resumed run would go on with other data or weights than it began with."""
    for name, value in origin.items():
        before = tracker.recorded().get(name, value)
        if before != value:
            raise UserError(f"--resume {tracker.run_id}: {name} was {before} and is {value} now; start a new run")


def _train(
    config: TrainConfig, tracker: Tracker, data: Data, machine: Machine, model: ResNet, say: Say
) -> list[EpochRecord]:
    """Run the loop and log each epoch; returns the records."""
    train, val = (make_split(data.manifest, data.store, name) for name in ("train", "val"))
    weights = class_weights(train.labels)
    tracker.params({f"class_weight.{name}": f"{weight:.6f}" for name, weight in zip(CLASSES, weights, strict=True)})
    tracker.figure(_views_figure(config, train), "plots/train_views.png")
    if machine.precision == "bf16" and machine.device.type == "cpu" and not cpu_has_bf16():
        say("note: this processor has no bf16 units; fp32 is several times faster here")

    data_source = Activations(
        model,
        train,
        val,
        config.batch_size,
        config.seed,
        min(config.views, config.epochs * len(config.phases)),  # no more will be shown
        machine.precision,
        config.reuse_gb * 1e9,
        lambda batches, total: tqdm(batches, total=total, unit="step", leave=False, disable=None),
        cache_folder(config.cache_dir) / "activations",
    )
    records, logged = [], tracker.logged("val_loss")
    checkpoints = Checkpoints(checkpoint_folder(config, tracker.run_id))
    if logged and not (checkpoints.folder / LAST).exists():
        raise UserError(
            f"--resume {tracker.run_id}: {checkpoints.folder} holds no checkpoint of its {logged} epochs; "
            "resume on the machine and with the --cache-dir that it had, or start a new run"
        )
    for record in fit(
        model,
        config.phases,
        config.rates(),
        Schedule(
            config.epochs, config.weight_decay, config.step_size, config.gamma, config.patience, machine.precision
        ),
        weights,
        data_source.train_batches,
        data_source.val_batches,
        checkpoints,
    ):
        records.append(record)
        if record.epoch >= logged:
            tracker.metrics({**record.metrics, "phase": record.phase_index}, step=record.epoch)
        say(_epoch_line(record))
    return records


def _epoch_line(record: EpochRecord) -> str:
    m = record.metrics
    line = (
        f"epoch {record.epoch:2} {record.phase:4}  loss {m['train_loss']:.4f} / val {m['val_loss']:.4f}  "
        f"accuracy {m['train_accuracy']:.3f} / val {m['val_accuracy']:.3f}  val AUC {m['val_roc_auc']:.4f}  "
        f"{m['images_per_second']:.0f} img/s  {m['epoch_seconds'] + m['eval_seconds']:.1f} s"
    )
    return line + ("  *" if record.improved else "")


def _views_figure(config: TrainConfig, train: Split) -> Figure:
    """Six training images, each as it is and as its first views."""
    shown = np.linspace(0, len(train) - 1, 6).astype(np.int64)
    images = torch.from_numpy(train.dataset.images[train.dataset.rows[shown]])
    rows, captions = [images], ["as it is"] * 6
    for view in range(min(config.views, 2)):
        parameters = torch.from_numpy(view_parameters(config.seed, train.keys[shown], view))
        rows.append(augment(images, parameters).byte())
        captions += [f"view {view}"] * 6
    return plots.image_grid(torch.cat(rows).numpy(), captions, "What the network sees in training")


def _report(config: TrainConfig, data: Data, machine: Machine, model: ResNet, name: str) -> Report:
    split = make_split(data.manifest, data.store, name)
    logits, _ = infer(model, eval_batches(split, config.batch_size, machine.device))
    table = predictions_table(data.part(name), logits.numpy(), THRESHOLD)
    return evaluate(table, name, THRESHOLD, config.bootstrap)


def _log_end(config: TrainConfig, tracker: Tracker, model: ResNet, result: RunResult) -> str:
    """Reports, figures, proofs, the model, and what a person should know. Returns what the registry made of it."""
    name, best = f"{config.strategy}, seed {config.seed}", result.best.epoch
    tracker.table(result.history, "tables/history.csv")
    tracker.figure(plots.learning_curves(result.history, best, f"Learning curves: {name}"), "plots/learning_curves.png")
    tracker.text(json.dumps([asdict(proof) for proof in result.proofs], indent=2) + "\n", "freeze_proofs.json")
    for report in (result.val, result.test):
        _log_report(tracker, report, name)
    sizes = {
        "parameters_total": count_parameters(model),
        "parameters_trained": count_parameters(model, config.phases[-1].trainable),
    }
    model_id = _log_model(config, tracker, model, result)
    registration = _register(config, tracker, model_id, result)
    if not tracker.logged("test_roc_auc"):
        # After the last epoch's step, so that `val_accuracy` of the result neither hides in nor doubles an epoch's.
        final = {**result.val.figures(), **result.test.figures(), **sizes}
        tracker.metrics(final, step=len(result.records), model_id=model_id)
    tracker.tags(
        {
            "freezing": "; ".join(_proof_words(proof) for proof in result.proofs),
            "best_epoch": str(best),
            "registered": registration,
            "mlflow.note.content": "\n\n".join([*summary(config, tracker, result), registration]),
        }
    )
    return registration


def _log_model(config: TrainConfig, tracker: Tracker, model: ResNet, result: RunResult) -> str | None:
    if not isinstance(tracker, MlflowTracker):
        return None
    card = ModelCard(
        arch=config.arch,
        image_size=config.image_size,
        resize=config.resize,
        threshold=THRESHOLD,
        strategy=config.strategy,
        data_fingerprint=result.data.fingerprint,
        weights=result.weights,
        class_to_index=CLASS_TO_INDEX,
    )
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
        "data_fingerprint": result.data.fingerprint,
        "val_fingerprint": fingerprint(val),
        "val_loss": repr(result.best.metrics["val_loss"]),
        "val_roc_auc": repr(result.val.values["roc_auc"]),
        "threshold": repr(THRESHOLD),
        "class_to_index": json.dumps(CLASS_TO_INDEX),
        "preprocessing": f"grey, {config.resize} to {config.image_size}x{config.image_size}, ImageNet mean and std",
    }
    return registry.register(model_id, config.register, tags).line()


def _proof_words(proof: FreezeProof) -> str:
    stages = ", ".join(proof.stages)
    return f"phase {proof.phase}: {stages} unchanged" if stages else f"phase {proof.phase}: nothing was frozen"


def _log_report(tracker: Tracker, report: Report, name: str) -> None:
    split, labels, probabilities = report.split, report.labels, report.probabilities
    title = f"{SPLIT_NAMES[split]}: {name}"
    tracker.table(report.table, f"tables/{split}_predictions.csv")
    tracker.text(report.text(), f"reports/{split}.txt")
    figures = {
        "confusion_matrix": plots.confusion_matrix(report.counts(), CLASSES, title),
        "roc": plots.roc_curve(labels, probabilities, report.interval("roc_auc"), title, report.threshold),
        "pr": plots.pr_curve(labels, probabilities, report.interval("pr_auc"), title, report.threshold),
        "reliability": plots.reliability_diagram(labels, probabilities, report.values["ece"], title),
        "metrics": plots.metric_bars({m: report.interval(m) for m in report.values}, title),
    }
    for kind, figure in figures.items():
        tracker.figure(figure, f"plots/{split}_{kind}.png")


def _example(size: int) -> bytes:
    """A phantom as PNG: a patient's image has no place in a model's files."""
    buffer = io.BytesIO()
    Image.fromarray(phantom(np.random.default_rng(0), "normal", size)).save(buffer, "PNG")
    return buffer.getvalue()


def _data_words(data: Data) -> str:
    counts = data.manifest["split"].value_counts()
    words = "synthetic phantoms (NOT real X-rays)" if data.synthetic else "X-rays"
    skipped = f", {len(data.bad)} unreadable images SKIPPED" if data.bad else ""
    return f"{words}, train {counts['train']}, val {counts['val']}, test {counts['test']} images{skipped}"


def summary(config: TrainConfig, tracker: Tracker, result: RunResult) -> list[str]:
    """Lines for a person: what came out, on what, where to look, what to run next."""
    best, test, weights = result.best, result.test, result.weights
    shown = ("accuracy", "roc_auc", "recall", "specificity")
    others = [name for name in STRATEGIES if name != config.strategy]
    return [
        f"{config.strategy}, seed {config.seed}: best epoch {best.epoch} (phase {best.phase}) "
        f"of {len(result.records)}, val_loss {best.metrics['val_loss']:.4f}, "
        f"val ROC-AUC {format_interval(result.val.interval('roc_auc'))}",
        f"test, threshold {test.threshold:g}: "
        + ", ".join(f"{name} {format_interval(test.interval(name))}" for name in shown),
        f"data: {_data_words(result.data)}; fingerprint {result.data.fingerprint}",
        f"weights: {weights}"
        + ("; pretraining is what these strategies compare" if weights.startswith("random") else ""),
        f"took: {result.seconds:.0f} s",
        *(f"look: {where}" for where in tracker.where()),
        f"next: the same with --strategy {', '.join(others[:-1])} or {others[-1]}",
    ]
