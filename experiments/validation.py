"""What the experiments on validation share: the metrics of a split under stress."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import balanced_accuracy_score
from torchvision.models import ResNet

from cxr.config import TrainConfig
from cxr.data.batches import make_split, straight_order, view_batches
from cxr.data.load import Data
from cxr.data.views import PLAIN, STRESSES, View
from cxr.evaluation.report import weighted_loss
from cxr.machine import Machine
from cxr.network.inference import infer
from cxr.training.loop import class_weights

EVERY_VIEW = (PLAIN, *(View(stress=name) for name in STRESSES))


def shown(config: TrainConfig, data: Data, machine: Machine, model: ResNet, split: str = "val") -> dict[str, float]:
    """Loss (weighted by class) and balanced accuracy of all images of a split, plain and under every stress."""
    part = make_split(data.manifest, data.store, split)
    weights = class_weights(data.part("train")["label"].to_numpy(np.int64))
    row: dict[str, float] = {}
    for view in EVERY_VIEW:
        batches = view_batches(part, straight_order(part, config.batch_size), 0, view, machine.device)
        logits, labels = infer(model, batches, machine.precision)
        name = view.stress or "plain"
        row[f"loss {name}"] = weighted_loss(logits, labels, weights)
        row[f"accuracy {name}"] = float(balanced_accuracy_score(labels.numpy(), logits.argmax(1).numpy()))
    for figure in ("loss", "accuracy"):
        row[f"{figure} stressed"] = float(np.mean([row[f"{figure} {name}"] for name in STRESSES]))
    row["loss worst"] = max(row[f"loss {name}"] for name in STRESSES)
    return row
