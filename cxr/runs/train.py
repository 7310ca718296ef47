"""One run from configuration to result: data, training, evaluation. The only place that sees it all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from cxr.config import TrainConfig, flatten
from cxr.data.batches import make_split, stress_sizes
from cxr.data.load import Data, read_data
from cxr.data.splits import fingerprint
from cxr.data.views import Batch
from cxr.errors import UserError
from cxr.evaluation.report import stressed_metrics
from cxr.machine import Machine, cpu_has_bf16, describe, memory_errors, peak_memory, ready_machine, reset_peak_memory
from cxr.network.inference import infer
from cxr.network.resnet import ready_model
from cxr.runs.audit import audited
from cxr.runs.messages import (
    Say,
    data_words,
    decision_table,
    epoch_line,
    links,
    reuse_lines,
    source_lines,
    summary,
)
from cxr.runs.record import log_end, log_start, views_figure
from cxr.runs.reports import before_training, outputs_of, reports
from cxr.runs.result import RunResult
from cxr.runs.resume import checkpoints_of, outbox_of, recorded_config, remove_finished
from cxr.storage import Cache, exclusive, remove_folder
from cxr.tracking.lifecycle import existing_run, open_run
from cxr.tracking.reading import Artifact, Tag
from cxr.tracking.tracker import NullTracker, Tracker
from cxr.training import distributed as parallel
from cxr.training.batch_source import BatchSource, SourceSettings
from cxr.training.checkpoint import LAST, Checkpoints
from cxr.training.loop import EpochRecord, Schedule, class_weights, fit


def run(config: TrainConfig, tracker: Tracker, say: Say = print) -> RunResult:
    """Train by `config`, evaluate the best checkpoint on validation and, once, on test; log all of it."""
    started = time.perf_counter()
    tracker.params(flatten(config))  # first, because resuming reads them
    machine = ready_machine(config)
    reset_peak_memory(machine.device)
    data = read_data(config)
    model, weights = ready_model(config, len(data.task.classes), machine.device)
    findings = audited(config, data, model, machine.precision)
    log_start(config, tracker, data, machine, weights, findings)
    before = before_training(config, data, model, machine.precision)
    if found := [finding.check for finding in findings if not finding.ok]:
        say(f"audit: warnings for {', '.join(found)}; see data/audit.txt in the run, or run `cxr data audit`")
    for line in source_lines(data):
        say(line)
    say(f"data: {data_words(data)}\nstart: {config.arch}, weights {weights}, on {describe(machine.device)}")
    if config.figures == "all":
        tracker.figure(views_figure(config, make_split(data.manifest, data.store, "train")), Artifact.TRAIN_VIEWS)
    parallel.agreed((config, tracker.run_id))  # the other processes begin here
    records, source = train_model(config, tracker, data, machine, model, say)
    stressed = _stressed(config, machine, model, source, data)
    held_out: dict[str, str] = {Tag.TEST_SPLIT: fingerprint(data.part(data.held_out))}
    uses = tracker.count(held_out)
    tracker.tags(held_out)  # before it is looked at, whatever comes then
    done = reports(config, data, outputs_of(config, data, model, before))
    earlier = sum(each.metrics["epoch_seconds"] + each.metrics["eval_seconds"] for each in records if each.restored)
    seconds = time.perf_counter() - started + earlier
    memory = peak_memory(machine.device)
    known = (weights, records, done, data, seconds, memory, stressed, uses)
    result = RunResult(tracker.run_id, *known, findings=tuple(findings))
    return replace(result, registered=log_end(config, tracker, model, result))


def run_tracked(
    config: TrainConfig, say: Say = print, run_id: str | None = None, parent: str | None = None
) -> RunResult:
    """`run` in MLflow: in the run `run_id`, else in the one that `mlflow run` opened, else in a new one.

    With `parent`, it is a child of that run, and the one that `mlflow run` opened is left alone. A run that exists
    continues with the parameters that it recorded. Its checkpoints are removed once it is finished.
    Raises `UserError` also when the run is unknown, finished, or in use by another process.
    """
    existing = existing_run(run_id, child=parent is not None)
    remove_finished(config)
    if existing:
        config = recorded_config(existing, config, resumed=run_id is not None)
    with ExitStack() as stack:
        stack.enter_context(memory_errors())
        if existing:  # before it is opened: a run that another process trains must not be touched
            stack.enter_context(exclusive(checkpoints_of(config, existing)))
        tracker = stack.enter_context(
            open_run(f"{config.strategy}-s{config.seed}", run_id=existing, parent=parent, outbox=outbox_of(config))
        )
        if not existing:
            stack.enter_context(exclusive(checkpoints_of(config, tracker.run_id)))
        result = run(config, tracker, say)
        lines = [*summary(config, result, decision_table), result.registered, *links(config, tracker)]
    remove_folder(checkpoints_of(config, tracker.run_id))  # a run that begins may be removing it, too
    say("\n" + "\n".join(lines))
    return result


def run_with_processes(config: TrainConfig, say: Say = print, run_id: str | None = None) -> None:
    """`run_tracked`, in step with the other processes if torchrun started any. Raises as `run_tracked`."""
    with parallel.joined(config.device):
        if parallel.rank() == 0:
            run_tracked(config, say, run_id)
        else:
            _follow(config)


def _follow(config: TrainConfig) -> None:
    """What the other processes do: train along in the run that the first one opened. They log and write nothing."""
    config, run_id = parallel.agreed((config, ""))
    machine = ready_machine(config)
    data = read_data(config)
    model, _ = ready_model(config, len(data.task.classes), machine.device)
    with memory_errors():
        train_model(config, NullTracker(run_id), data, machine, model, lambda line: None)


def train_model(
    config: TrainConfig,
    tracker: Tracker,
    data: Data,
    machine: Machine,
    model: nn.Module,
    say: Say,
    watch: Callable[[EpochRecord], object] = lambda record: None,
    label: str = "",
    runs: int = 1,
) -> tuple[list[EpochRecord], BatchSource]:
    """Run the loop and log each epoch, its metrics' names after `label`; returns the records and the batches' source.

    `watch` sees each record once it is logged, and may raise to end the run. `runs` like this one share activations.
    """
    source, weights = _source(config, data, machine, model, runs)
    names = zip(data.task.keys, weights, strict=True)
    tracker.params({f"class_weight.{name}": f"{weight:.6f}" for name, weight in names})
    if machine.precision == "bf16" and machine.device.type == "cpu" and not cpu_has_bf16():
        say("note: this processor has no bf16 units; fp32 is several times faster here")
    tracker.write_ahead(config.tracking_patience, say)
    records, logged = [], tracker.logged(f"{label}val_loss")
    checkpoints = Checkpoints(checkpoints_of(config, tracker.run_id) / label, parallel.rank() == 0)
    if logged and not (checkpoints.folder / LAST).exists():
        raise UserError(
            f"--resume {tracker.run_id}: {checkpoints.folder} holds no checkpoint of its {len(logged)} epochs; "
            "resume on the machine and with the --cache-dir that it had, or start a new run"
        )
    for line in reuse_lines(source.plan):
        say(line)
    with checkpoints:
        for record in fit(model, _schedule(config, machine), weights, source, checkpoints):
            records.append(record)
            # One that was logged and not yet saved when a run was broken off has been trained again; a GPU may differ.
            if logged.get(record.epoch) != record.metrics["val_loss"]:
                named = {f"{label}{name}": value for name, value in record.metrics.items()}
                tracker.metrics({**named, f"{label}phase": record.phase_index}, step=record.epoch)
            say(epoch_line(record))
            watch(record)
    return records, source


def _schedule(config: TrainConfig, machine: Machine) -> Schedule:
    return Schedule(
        config.phases,
        config.rates(),
        config.epochs,
        config.weight_decay,
        config.step_size,
        config.gamma,
        config.patience,
        machine.precision,
        config.select,
        machine.compile,
        config.average,
        config.seed,
    )


def _source(
    config: TrainConfig, data: Data, machine: Machine, model: nn.Module, runs: int
) -> tuple[BatchSource, torch.Tensor]:
    """(the batches, the class weights [2]) of a training run; `runs` is the number of runs that share activations."""
    fold = config.fold_numbers()
    train, val = (make_split(data.manifest, data.store, name) for name in ("train", "val"))
    settings = SourceSettings(
        config.batch_size,
        config.seed,
        min(config.views, config.epochs * len(config.phases)),  # no more are shown
        machine.precision,
        config.reuse_gb * 1e9,
        config.phases,
        Cache.open(config.cache_dir),
        augment=config.augment,
        stresses=config.stresses,
        epochs=config.epochs,
        runs=max(runs, fold[1] if fold else 1),
        progress=_progress,
    )
    return BatchSource(model, train, val, settings), class_weights(train.labels)


def _progress(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
    return tqdm(batches, total=total, unit="step", leave=False, disable=True if parallel.rank() else None)


def _stressed(
    config: TrainConfig, machine: Machine, model: nn.Module, source: BatchSource, data: Data
) -> dict[str, float]:
    """The metrics of the validation images under the stresses: overall, and the loss under each."""
    phase = config.phases[-1]
    logits, labels = infer(model, source.stressed(phase), machine.precision, phase.trainable)
    weights = class_weights(data.part("train")["label"].to_numpy(np.int64))
    return stressed_metrics(logits, labels, weights, stress_sizes(source.stressed_parts))
