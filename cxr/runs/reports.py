"""From logits of validation and the held-out split to their reports; the stressed validation of a finished model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

from cxr.config import TrainConfig
from cxr.data.batches import (
    eval_batches,
    make_split,
    part_of,
    straight_order,
    stress_sizes,
    stressed_parts,
    view_batches,
)
from cxr.data.load import Data
from cxr.errors import MachineError
from cxr.evaluation.calibration import Calibration, fit
from cxr.evaluation.familiarity import Familiarity
from cxr.evaluation.metrics import Floats, Ints
from cxr.evaluation.predictions import HALF, predictions_table
from cxr.evaluation.report import (
    Report,
    certainties_of,
    evaluate,
    implied_prevalence,
    origin_of,
    stressed_metrics,
    with_selection,
)
from cxr.evaluation.selective import certainty_limit
from cxr.evaluation.thresholds import choose_threshold
from cxr.network.inference import infer, infer_with_features
from cxr.network.start import StartNetwork
from cxr.serving.familiar import Familiar
from cxr.storage import Cache
from cxr.training.batch_source import evaluation_batches, pooled_features
from cxr.training.loop import class_weights

Float32 = npt.NDArray[np.float32]
SAMPLE, AGREEMENT = 8, 1e-4  # images that are checked, and by how much their probabilities may differ


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the reports are made from: the logits [n, k] and the familiarity [n] of a split's images in order, by name.

    `familiar` is what measured the familiarity.
    """

    logits: Callable[[str], Float32]
    percentiles: Callable[[str], Floats]
    familiar: Familiar


@dataclass(frozen=True, slots=True)
class Reports:
    """The reports of validation and the held-out split, and what was fitted on validation for them."""

    val: Report
    test: Report
    calibration: Calibration
    certainty_limit: float
    familiar: Familiar


@dataclass(frozen=True, slots=True)
class Before:
    """What familiarity needs of a network before it is trained: its start weights, and the features of the training
    images [n, d], each of length 1."""

    start: StartNetwork
    train: Float32


def before_training(config: TrainConfig, data: Data, model: nn.Module, precision: str) -> Before:
    """Of a network that will be trained. The features are those that the audit has kept, if it has."""
    features = pooled_features(config, data, model, precision, ("train",))
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return Before(StartNetwork.of(model, config.phases), features / np.maximum(lengths, 1e-12))


def _require_agreement(data: Data, name: str, model: nn.Module, logits: torch.Tensor, folder: Path) -> None:
    """Raise `MachineError` unless the whole network gives the same probabilities for a sample of the images."""
    split = make_split(data.manifest, data.store, name)
    rows = np.unique(np.linspace(0, len(split) - 1, SAMPLE).astype(np.int64))
    own, _ = infer(model, eval_batches(part_of(split, rows), len(rows), next(model.parameters()).device))
    gap = float((own.softmax(1) - logits[torch.from_numpy(rows)].softmax(1)).abs().max())
    if not gap <= AGREEMENT:
        raise MachineError(
            f"{folder}: what is kept of the frozen layers gives other probabilities than the network (by {gap:.2g}); "
            "remove this folder and resume the run"
        )


def outputs_of(config: TrainConfig, data: Data, model: nn.Module, before: Before) -> Outputs:
    """The outputs of a trained network, each split computed once."""

    @cache
    def run(name: str) -> tuple[Float32, Float32]:
        batches, shared = evaluation_batches(config, data, model, before.start.shared, name)
        features, logits = infer_with_features(model, before.start, batches, shared=shared)
        if shared:
            _require_agreement(data, name, model, logits, Cache.open(config.cache_dir).activations)
        return features.numpy(), logits.numpy()

    labels = data.part("train")["label"].to_numpy(np.int64)
    distances = Familiarity.fit(before.train, labels, run("val")[0])
    return Outputs(
        lambda name: run(name)[1],
        lambda name: distances.percentiles(run(name)[0]),
        Familiar(before.start, distances),
    )


def reports(config: TrainConfig, data: Data, outputs: Outputs) -> Reports:
    """Both reports: what is fitted is fitted on validation, before the held-out split is looked at."""
    val, held_out = data.part("val"), data.held_out
    labels, task = val["label"].to_numpy(np.int64), data.task
    logits = outputs.logits("val")
    calibration = fit(config.calibration, logits.astype(np.float64), labels)
    threshold = chosen_threshold(config, labels, calibration.probabilities(logits))
    prevalence = implied_prevalence(calibration, float(labels.mean()))
    origins = [origin_of(config.threshold_rule, split) for split in ("val", "test")]
    table = predictions_table(val, logits, threshold, calibration, task)
    limit = limit_of(table, threshold, config.abstain)
    val_table = with_selection(table, threshold, limit, outputs.percentiles("val"))
    test_table = predictions_table(data.part(held_out), outputs.logits(held_out), threshold, calibration, task)
    test_table = with_selection(test_table, threshold, limit, outputs.percentiles(held_out))
    return Reports(
        evaluate(val_table, "val", threshold, config.bootstrap, origin=origins[0]).about(task),
        evaluate(test_table, held_out, threshold, config.bootstrap, prevalence, origins[1]).about(task),
        calibration,
        limit,
        outputs.familiar,
    )


def limit_of(val: pd.DataFrame, threshold: float, abstain: float) -> float:
    """The certainty below which a prediction abstains, from the predictions table of validation."""
    return certainty_limit(certainties_of(val, threshold), abstain)


def chosen_threshold(config: TrainConfig, labels: Ints, probabilities: Floats) -> float:
    """The threshold by the rule, on probabilities [n, k] of validation; one half, unused, for more than two classes."""
    if probabilities.shape[1] > 2:
        return HALF
    return choose_threshold(config.threshold_rule, labels, probabilities[:, 1])


def stressed_validation(config: TrainConfig, data: Data, model: nn.Module) -> dict[str, float]:
    """The metrics of the validation images under the stresses, in fp32, on the model's device."""
    val, train = make_split(data.manifest, data.store, "val"), data.part("train")
    parts = stressed_parts(val, len(train), config.stresses)
    orders = {view: straight_order(part, config.batch_size) for view, part in parts.items()}
    device = next(model.parameters()).device
    shown = (batch for view, part in parts.items() for batch in view_batches(part, orders[view], 0, view, device))
    weights = class_weights(train["label"].to_numpy(np.int64))
    return stressed_metrics(*infer(model, shown), weights, stress_sizes(parts))
