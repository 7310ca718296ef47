"""From logits of validation and the held-out split to their reports; the stressed validation of a finished model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models import ResNet

from cxr.config import TrainConfig
from cxr.data.batches import make_split, straight_order, stress_sizes, stressed_parts, view_batches
from cxr.data.load import Data
from cxr.evaluation.calibration import Calibration, fit_calibration, margins_of
from cxr.evaluation.report import Report, evaluate, implied_prevalence, origin_of, predictions_table, stressed_metrics
from cxr.evaluation.thresholds import choose_threshold
from cxr.network.ensemble import Ensemble
from cxr.network.inference import infer
from cxr.training.loop import class_weights

Float32 = npt.NDArray[np.float32]


def reports(config: TrainConfig, data: Data, logits_of: Callable[[str], Float32]) -> tuple[Report, Report, Calibration]:
    """(validation, held-out split, calibration): what is fitted is fitted on validation, before test is looked at.

    `logits_of(split)` are the logits [n, 2] of a split's images in order.
    """
    val, held_out = data.part("val"), data.held_out
    labels = val["label"].to_numpy(np.int64)
    logits = logits_of("val")
    calibration = fit_calibration(config.calibration, margins_of(logits), labels)
    threshold = choose_threshold(config.threshold_rule, labels, calibration.apply(margins_of(logits)))
    prevalence = implied_prevalence(calibration, float(labels.mean()))
    origins = [origin_of(config.threshold_rule, split) for split in ("val", "test")]
    val_table = predictions_table(val, logits, threshold, calibration)
    test_table = predictions_table(data.part(held_out), logits_of(held_out), threshold, calibration)
    return (
        evaluate(val_table, "val", threshold, config.bootstrap, origin=origins[0]),
        evaluate(test_table, held_out, threshold, config.bootstrap, prevalence, origins[1]),
        calibration,
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
