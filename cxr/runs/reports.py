"""From logits of validation and the held-out split to their reports; the stressed validation of a finished model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models import ResNet

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
from cxr.evaluation.calibration import Calibration, fit_calibration, margins_of
from cxr.evaluation.familiarity import Familiarity
from cxr.evaluation.report import (
    Report,
    evaluate,
    implied_prevalence,
    origin_of,
    predictions_table,
    stressed_metrics,
    with_selection,
)
from cxr.evaluation.selective import certainty, certainty_limit
from cxr.evaluation.thresholds import choose_threshold
from cxr.network.ensemble import Ensemble
from cxr.network.inference import infer, infer_with_features
from cxr.training.loop import class_weights

Float32 = npt.NDArray[np.float32]
BANK = 1000  # training images that familiarity compares with; more change little and cost a forward pass each


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the reports are made from: the logits [n, 2] and features [n, d] of a split's images in order, by name.

    `bank` are the features of training images.
    """

    logits: Callable[[str], Float32]
    features: Callable[[str], Float32]
    bank: Float32


@dataclass(frozen=True, slots=True)
class Reports:
    """The reports of validation and the held-out split, and what was fitted on validation for them."""

    val: Report
    test: Report
    calibration: Calibration
    certainty_limit: float
    familiarity: Familiarity


def outputs_of(config: TrainConfig, data: Data, model: ResNet | Ensemble, device: torch.device) -> Outputs:
    """The outputs of a network, each split computed once."""

    @cache
    def run(name: str) -> tuple[Float32, Float32]:
        split = make_split(data.manifest, data.store, name)
        features, logits = infer_with_features(model, eval_batches(split, config.batch_size, device))
        return features.numpy(), logits.numpy()

    train = make_split(data.manifest, data.store, "train")
    chosen = part_of(train, np.sort(np.argsort(train.keys)[:BANK]))
    bank, _ = infer_with_features(model, eval_batches(chosen, config.batch_size, device))
    return Outputs(lambda name: run(name)[1], lambda name: run(name)[0], bank.numpy())


def reports(config: TrainConfig, data: Data, outputs: Outputs) -> Reports:
    """Both reports: what is fitted is fitted on validation, before the held-out split is looked at."""
    val, held_out = data.part("val"), data.held_out
    labels = val["label"].to_numpy(np.int64)
    logits = outputs.logits("val")
    calibration = fit_calibration(config.calibration, margins_of(logits), labels)
    threshold = choose_threshold(config.threshold_rule, labels, calibration.apply(margins_of(logits)))
    prevalence = implied_prevalence(calibration, float(labels.mean()))
    origins = [origin_of(config.threshold_rule, split) for split in ("val", "test")]
    familiarity = Familiarity.fit(outputs.bank, outputs.features("val"))
    table = predictions_table(val, logits, threshold, calibration)
    limit = certainty_limit(certainty(table["probability"].to_numpy(np.float64), threshold), config.abstain)
    val_table = with_selection(table, threshold, limit, familiarity.percentiles(outputs.features("val")))
    test_table = predictions_table(data.part(held_out), outputs.logits(held_out), threshold, calibration)
    test_table = with_selection(test_table, threshold, limit, familiarity.percentiles(outputs.features(held_out)))
    return Reports(
        evaluate(val_table, "val", threshold, config.bootstrap, origin=origins[0]),
        evaluate(test_table, held_out, threshold, config.bootstrap, prevalence, origins[1]),
        calibration,
        limit,
        familiarity,
    )


def stressed_validation(config: TrainConfig, data: Data, model: ResNet | Ensemble) -> dict[str, float]:
    """The metrics of the validation images under the stresses, of a model on the CPU."""
    val, train = make_split(data.manifest, data.store, "val"), data.part("train")
    parts = stressed_parts(val, len(train), config.stresses)
    orders = {view: straight_order(part, config.batch_size) for view, part in parts.items()}
    device = torch.device("cpu")
    shown = (batch for view, part in parts.items() for batch in view_batches(part, orders[view], 0, view, device))
    weights = class_weights(train["label"].to_numpy(np.int64))
    return stressed_metrics(*infer(model, shown), weights, stress_sizes(parts))
