"""Several finished runs as one model: calibrated and evaluated as a whole, logged in a run, and registered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure

from cxr.config import TrainConfig, flatten, require_model_name
from cxr.data.load import Data, read_data
from cxr.data.splits import fingerprint
from cxr.errors import UserError
from cxr.evaluation.predictions import logits_of
from cxr.evaluation.report import weighted_loss
from cxr.figures.html import html_page
from cxr.machine import Machine, describe, ready_machine
from cxr.network.ensemble import Ensemble, combined
from cxr.network.freezing import count_parameters
from cxr.runs.messages import Say, decision_lines
from cxr.runs.page import evaluation_page
from cxr.runs.record import example_of, log_metrics, log_report, note_data, version_tags
from cxr.runs.reports import Outputs, Reports, reports, stressed_validation
from cxr.serving.predictor import ModelCard, Predictor
from cxr.tracking import registry
from cxr.tracking.cards import described
from cxr.tracking.lifecycle import git_commit, open_run
from cxr.tracking.reading import Artifact, LoggedRun, RunKind, Tag
from cxr.tracking.tracker import MlflowTracker
from cxr.training.loop import class_weights

# Parameters that members must share: what enters the networks, and what is chosen on validation.
SHARED = ("arch", "image_size", "resize", "calibration", "threshold", "select", "stresses", "fold")
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Whole:
    """An ensemble before it is logged: its network, its card, the reports, the losses that rank it, and the device
    that it was shown the stressed images on."""

    network: Ensemble
    card: ModelCard
    reports: Reports
    losses: dict[str, float]
    stressed: dict[str, float]
    device: str


def ensemble_tracked(
    run_ids: Sequence[str],
    name: str = "cxr-pneumonia",
    data_dir: str | None = None,
    cache_dir: str | None = None,
    say: Say = print,
    parent: str | None = None,
) -> str:
    """Log finished runs as one model in a new run, and register it as a version of `name` (`none`: not).

    `data_dir` and `cache_dir` replace those of the runs, if they have moved. With `parent`, the new run is a child of
    that run. Returns the ID of the new run. Raises `UserError`, before a run is created, for runs that cannot be
    combined and images that are not those of the runs.
    """
    require_model_name(name, "--name")
    runs = [LoggedRun.open(run_id) for run_id in run_ids]
    config = _shared_config(runs)
    config = replace(config, data_dir=data_dir or config.data_dir, cache_dir=cache_dir or config.cache_dir)
    data = read_data(config)
    _require_data(runs, data)
    _require_order(runs, data)
    predictors = [registry.load(f"models:/{registry.model_of(run)}") for run in runs]
    _require_familiar(runs[0], predictors[0])
    whole = _whole(config, data, runs, predictors)
    with open_run(f"{whole.card.strategy}-ensemble-{len(runs)}", parent=parent, again="the same command") as tracker:
        say("\n".join(_log(config, data, runs, whole, tracker, name)))
    return str(tracker.run_id)


def _shared_config(runs: Sequence[LoggedRun]) -> TrainConfig:
    """The configuration of the first run, whose shared parameters are those of all."""
    if len(runs) < 2 or len({run.run_id for run in runs}) < len(runs):
        raise UserError("an ensemble needs two or more different runs")
    for run in runs:
        if not run.finished or run.kind is RunKind.ENSEMBLE or not run.train_params():
            raise UserError(f"run {run.run_id}: not a finished training run; only these can be combined")
    configs = [run.config() for run in runs]
    for parameter in SHARED:
        values = {str(getattr(config, parameter)) for config in configs}
        if len(values) > 1:
            raise UserError(f"the runs differ in {parameter} ({', '.join(sorted(values))}) and cannot be combined")
    if configs[0].fold_numbers():
        raise UserError("the runs are folds, which are evaluated on different images and cannot be combined")
    return configs[0]


def _require_data(runs: Sequence[LoggedRun], data: Data) -> None:
    for run in runs:
        recorded = run.tags.get(Tag.DATA_FINGERPRINT)
        if run.task != data.task:
            raise UserError(
                f"run {run.run_id}: has the classes {run.task.words()}, and {data.root} {data.task.words()}; they "
                "cannot be combined"
            )
        if recorded != data.fingerprint:
            raise UserError(
                f"run {run.run_id}: was made with images {recorded}, and {data.root} holds {data.fingerprint}; all "
                "runs need the same images and split, see --data-dir"
            )


def _require_order(runs: Sequence[LoggedRun], data: Data) -> None:
    """The fingerprint does not depend on file names, but the order of the logged rows does."""
    for run in runs:
        for split in ("val", data.held_out):
            if list(run.predictions(split)["digest"]) != list(data.part(split)["digest"]):
                raise UserError(
                    f"run {run.run_id}: the {split} images are in another order than in {data.root}; files were "
                    "renamed since, and the runs cannot be combined"
                )


def _require_familiar(run: LoggedRun, predictor: Predictor) -> None:
    """Familiarity is that of the first member."""
    if predictor.familiar is None:
        raise UserError(
            f"run {run.run_id}: was made by version 0.1, whose models do not tell familiar images; train it again, or "
            "name another run first"
        )


def member_logits(runs: Sequence[LoggedRun], split: str) -> Float32:
    """The logits [n, k] of a split, combined from those that the runs logged."""
    stack = np.stack([logits_of(run.predictions(split)).astype(np.float32) for run in runs])
    logits: Float32 = combined(torch.from_numpy(stack)).numpy()
    return logits


def _whole(config: TrainConfig, data: Data, runs: Sequence[LoggedRun], predictors: Sequence[Predictor]) -> Whole:
    network = Ensemble(network for predictor in predictors for network in predictor.networks)
    familiar = predictors[0].familiar
    assert familiar is not None  # `_require_familiar`
    outputs = Outputs(
        lambda split: member_logits(runs, split),
        lambda split: runs[0].predictions(split)["familiarity"].to_numpy(np.float64),
        familiar,
    )
    found = reports(config, data, outputs)
    machine = _machine(config)
    stressed = stressed_validation(config, data, network.to(machine.device))
    weights = class_weights(data.part("train")["label"].to_numpy(np.int64))
    labels = torch.tensor(found.val.labels)
    losses = {"val_loss": weighted_loss(torch.from_numpy(member_logits(runs, "val")), labels, weights)}
    card = _card(predictors, found)
    losses["stressed_val_loss"] = stressed["stressed_val_loss"]
    return Whole(network.cpu(), card, found, losses, stressed, describe(machine.device))


def _machine(config: TrainConfig) -> Machine:
    """A GPU if there is one, wherever the members were trained, unless they were told to use the CPU; all its cores."""
    device = "cpu" if config.device == "cpu" else "auto"
    return ready_machine(replace(config, device=device, precision="fp32", compile="none", threads=0))


def _card(predictors: Sequence[Predictor], found: Reports) -> ModelCard:
    strategies = sorted({predictor.card.strategy for predictor in predictors})
    return replace(
        predictors[0].card,
        strategy="+".join(strategies),
        weights="; ".join(sorted({predictor.card.weights for predictor in predictors})),
        calibration=found.calibration,
        threshold=found.test.threshold,
        certainty_limit=found.certainty_limit,
        members=sum(len(predictor.networks) for predictor in predictors),
    )


def _log(
    config: TrainConfig, data: Data, runs: Sequence[LoggedRun], whole: Whole, tracker: MlflowTracker, name: str
) -> list[str]:
    """Everything in the run; returns the summary."""
    card, title = whole.card, f"ensemble of {whole.card.members}"
    weights = class_weights(data.part("train")["label"].to_numpy(np.int64)).tolist()
    own = {f"class_weight.{label}": f"{weight:.6f}" for label, weight in zip(data.task.keys, weights, strict=True)}
    tracker.params({"ensemble.runs": " ".join(run.run_id for run in runs), **flatten(config), **own})
    held_out: dict[str, str] = {Tag.TEST_SPLIT: fingerprint(data.part(data.held_out))}
    uses = tracker.count(held_out)
    of_images = {name: runs[0].tags[name] for name in (Tag.AUDIT, Tag.IMAGES_SKIPPED) if name in runs[0].tags}
    tracker.tags(held_out | of_images | _tags(data, card) | {Tag.DEVICE: whole.device})
    val, test = whole.reports.val, whole.reports.test
    tracker.table(data.manifest, Artifact.MANIFEST)
    note_data(tracker, data)
    figures: dict[str, Figure] = {}
    for report in (val, test):
        figures |= log_report(tracker, report, title)
    example, familiar = example_of(card.image_size), whole.reports.familiar
    model_id = registry.log_model(whole.network.state_dict(), card, example, familiar)
    gap = {"val_test_gap_roc_auc": val.values["roc_auc"] - test.values["roc_auc"]}
    sizes = dict.fromkeys(("parameters_total", "parameters_trained"), float(count_parameters(whole.network)))
    sizes["parameters_trained"] = float(count_parameters(whole.network, config.phases[-1].trainable))
    once = {"test_uses_before": float(uses)} | ({"chosen_threshold": test.threshold} if test.binary else {})
    log_metrics(tracker, (val, test), {**whole.stressed, **whole.losses, **gap, **sizes, **once}, 0, model_id)
    tags = version_tags(tracker.run_id, config, data, card, val, whole.losses)
    outcome = "not registered"
    if name != "none":
        outcome = described(registry.register(model_id, name, tags), card, tracker.run_id, model_id).line()
    lines = _summary(runs, whole, uses, outcome)
    tracker.text(html_page(evaluation_page(title, test, figures, lines, title, model_id)), Artifact.REPORT)
    lines += [f"look: {where}" for where in tracker.where()]
    tracker.tags({Tag.REGISTERED: outcome, Tag.DESCRIPTION: "\n\n".join(lines)})
    return lines


def _tags(data: Data, card: ModelCard) -> dict[str, str]:
    return {
        Tag.KIND: RunKind.ENSEMBLE,
        Tag.STRATEGY: card.strategy,
        Tag.ARCH: card.arch,
        Tag.WEIGHTS: card.weights,
        Tag.DATA: registry.DataKind.of(data.synthetic),
        Tag.CLASSES: json.dumps(data.task.classes),
        Tag.DATA_FINGERPRINT: data.fingerprint,
        Tag.PRECISION: "fp32",
        Tag.COMMIT: git_commit(),
        Tag.CALIBRATION: card.calibration.words(),
    }


def _summary(runs: Sequence[LoggedRun], whole: Whole, uses: int, outcome: str) -> list[str]:
    test = whole.reports.test
    alone = pd.Series([run.metric("test_roc_auc") for run in runs])
    return [
        f"ensemble of {whole.card.members} ({whole.card.strategy}): val_loss {whole.losses['val_loss']:.4f}, "
        f"stressed {whole.losses['stressed_val_loss']:.4f}",
        *decision_lines(test),
        f"members alone: roc_auc {alone.min():.4f} to {alone.max():.4f}",
        f"calibration: {whole.card.calibration.words()}",
        *([f"this test split was evaluated {uses} times before in this store"] if uses else []),
        outcome,
    ]
