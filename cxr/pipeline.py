"""One run from configuration to result: data, training, evaluation. The only place that sees it all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
from torchvision.models import ResNet
from tqdm import tqdm

from cxr.activations import Activations
from cxr.checkpoint import LAST, Checkpoints, exclusive
from cxr.config import TrainConfig, flatten, types_of, unflatten
from cxr.data.dataset import eval_batches, make_split
from cxr.data.index import CLASSES
from cxr.errors import UserError
from cxr.evaluate import Report, evaluate, predictions_table
from cxr.inputs import Data, Machine, checkpoint_folder, read_data, ready_machine
from cxr.model import build_model
from cxr.results import THRESHOLD, RunResult, Say, data_words, epoch_line, log_end, log_start, summary, views_figure
from cxr.runtime import cache_folder, cpu_has_bf16, describe
from cxr.tracking import Tracker, existing_run, open_run, recorded
from cxr.train import EpochRecord, Schedule, class_weights, fit, infer


def run(config: TrainConfig, tracker: Tracker, say: Say = print) -> RunResult:
    """Train by `config`, evaluate the best checkpoint on validation and, once, on test; log all of it."""
    started = time.perf_counter()
    tracker.params(flatten(replace(config, resume="none")))  # first of all: a resume reads them
    machine = ready_machine(config)
    data = read_data(config)
    model, weights = build_model(config.arch, config.weights, config.seed)
    model.to(device=machine.device, memory_format=torch.channels_last)
    log_start(config, tracker, data, machine, weights)
    say(f"data: {data_words(data)}\nstart: {config.arch}, weights {weights}, on {describe(machine.device)}")
    tracker.figure(views_figure(config, make_split(data.manifest, data.store, "train")), "plots/train_views.png")
    records = train_model(config, tracker, data, machine, model, say)
    val, test = (_report(config, data, machine, model, split) for split in ("val", "test"))
    result = RunResult(tracker.run_id, weights, records, val, test, data, time.perf_counter() - started)
    return replace(result, registered=log_end(config, tracker, model, result))


def run_tracked(config: TrainConfig, say: Say = print, parent: str | None = None) -> RunResult:
    """`run` in MLflow: a new run, the one that `mlflow run` opened, or the one to resume.

    With `parent`, it is a child of that run, and the one `mlflow run` opened is left alone.
    A run that is resumed goes on with the parameters it recorded. Its checkpoints are removed once it is finished.
    Raises `UserError` also when the run to resume is unknown, finished, or in use by another process.
    """
    run_id = existing_run(config.resume, child=parent is not None)
    if run_id:
        config = _recorded_config(run_id, config)
    with ExitStack() as stack:
        if run_id:  # before it is opened: a run that another process trains must not be touched
            stack.enter_context(exclusive(checkpoint_folder(config, run_id)))
        tracker = stack.enter_context(open_run(f"{config.strategy}-s{config.seed}", run_id=run_id, parent=parent))
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


def train_model(
    config: TrainConfig,
    tracker: Tracker,
    data: Data,
    machine: Machine,
    model: ResNet,
    say: Say,
    watch: Callable[[EpochRecord], object] = lambda record: None,
    label: str = "",
) -> list[EpochRecord]:
    """Run the loop and log each epoch, its metrics' names after `label`; returns the records.

    `watch` sees each record once it is logged, and may raise to end the run.
    """
    source, weights = _source(config, data, machine, model)
    names = zip(CLASSES, weights, strict=True)
    tracker.params({f"class_weight.{name}": f"{weight:.6f}" for name, weight in names})
    if machine.precision == "bf16" and machine.device.type == "cpu" and not cpu_has_bf16():
        say("note: this processor has no bf16 units; fp32 is several times faster here")
    records, logged = [], tracker.logged(f"{label}val_loss")
    checkpoints = Checkpoints(checkpoint_folder(config, tracker.run_id) / label)
    if logged and not (checkpoints.folder / LAST).exists():
        raise UserError(
            f"--resume {tracker.run_id}: {checkpoints.folder} holds no checkpoint of its {logged} epochs; "
            "resume on the machine and with the --cache-dir that it had, or start a new run"
        )
    schedule = Schedule(
        config.epochs, config.weight_decay, config.step_size, config.gamma, config.patience, machine.precision
    )
    batches = source.train_batches, source.val_batches
    for record in fit(model, config.phases, config.rates(), schedule, weights, *batches, checkpoints):
        records.append(record)
        if record.epoch >= logged:
            named = {f"{label}{name}": value for name, value in record.metrics.items()}
            tracker.metrics({**named, f"{label}phase": record.phase_index}, step=record.epoch)
        say(epoch_line(record))
        watch(record)
    return records


def _source(config: TrainConfig, data: Data, machine: Machine, model: ResNet) -> tuple[Activations, torch.Tensor]:
    """(the batches, the class weights [2]) of a training run."""
    train, val = (make_split(data.manifest, data.store, name) for name in ("train", "val"))
    source = Activations(
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
    return source, class_weights(train.labels)


def _report(config: TrainConfig, data: Data, machine: Machine, model: ResNet, name: str) -> Report:
    split = make_split(data.manifest, data.store, name)
    logits, _ = infer(model, eval_batches(split, config.batch_size, machine.device))
    table = predictions_table(data.part(name), logits.numpy(), THRESHOLD)
    return evaluate(table, name, THRESHOLD, config.bootstrap)
