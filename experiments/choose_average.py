"""Which mean of the weights, if any? Judged on validation images alone: the test split is never read.

    uv run python experiments/choose_average.py --data-dir FOLDER --seeds 2 --epochs 6 --out averages.csv

Result in LOG.md: "2026-11-26: averaging, looked at again".

Averages do not change the course of training, so that one training run gives all variants: the weights of the last
epoch, and the mean over the steps from the second and from the fourth epoch on, each with the mean of BatchNorm's
statistics or with statistics measured again (`torch.optim.swa_utils.update_bn`, one pass over the training images).
Every validation image is shown plain and under every stress. The table holds losses (weighted by class) and balanced
accuracy, also after a Platt calibration fitted on the plain validation images.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import update_bn
from torchvision.models import ResNet

from cxr.config import TrainConfig
from cxr.data.batches import make_split, straight_order, view_batches
from cxr.data.load import Data, read_data
from cxr.data.views import STRESSES, Batch
from cxr.evaluation.calibration import fit_calibration, margins_of
from cxr.evaluation.report import weighted_loss
from cxr.machine import Machine, ready_machine
from cxr.network.inference import autocast, infer
from cxr.network.resnet import ready_model
from cxr.network.stages import run_stages
from cxr.runs.resume import checkpoints_of
from cxr.runs.train import train_model
from cxr.tracking.tracker import NullTracker
from cxr.training.averaging import WeightAverage
from cxr.training.batch_source import BatchSource
from cxr.training.faster import Suffix
from cxr.training.loop import EpochRecord, class_weights
from validation import EVERY_VIEW

STARTS = (1, 3)  # epochs, counted from 0, from which the weights are averaged


class Followed:
    """The averages of a network's trained stages while it trains."""

    def __init__(self, model: ResNet, stages: tuple[str, ...]):
        self.epoch, self.averages = 0, {start: WeightAverage(model, stages) for start in STARTS}

    def step(self, *_: object) -> None:
        """Count the weights after an optimizer's step."""
        for start, average in self.averages.items():
            if self.epoch >= start:
                average.update()

    def watch(self, record: EpochRecord) -> None:
        """Note the end of an epoch."""
        self.epoch = record.epoch + 1

    @contextmanager
    def following(self) -> Iterator[None]:
        """While this holds, the steps of all optimizers count."""
        hook = register_optimizer_step_post_hook(self.step)
        try:
            yield
        finally:
            hook.remove()


def measured_again(average: WeightAverage, source: BatchSource, config: TrainConfig, machine: Machine) -> ResNet:
    """The averaged network with BatchNorm statistics of the training images."""
    suffix = Suffix(average.model, average.stages)
    with autocast(machine.device, machine.precision):
        update_bn((features for features, _ in source.train(config.phases[-1], 0)), suffix)
    return average.model.eval()


def prefix_outputs(
    model: ResNet, config: TrainConfig, data: Data, machine: Machine
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """View -> batches of what enters the trained stages, for the validation images."""
    part, found = make_split(data.manifest, data.store, "val"), {}
    for view in EVERY_VIEW:
        batches = view_batches(part, straight_order(part, config.batch_size), 0, view, machine.device)
        found[view.stress or "plain"] = [_through(model, batch, config, machine) for batch in batches]
    return found


def _through(model: ResNet, batch: Batch, config: TrainConfig, machine: Machine) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(), autocast(machine.device, machine.precision):
        return run_stages(model, batch[0], config.phases[-1].frozen), batch[1]


def judged(
    model: ResNet, outputs: dict[str, list[tuple[Tensor, Tensor]]], weights: Tensor, stages: tuple[str, ...]
) -> dict[str, float]:
    """The metrics of one variant."""
    logits = {name: infer(model, batches, "bf16", stages)[0] for name, batches in outputs.items()}
    labels = torch.cat([labels for _, labels in outputs["plain"]])
    platt = fit_calibration("platt", margins_of(logits["plain"].numpy()), labels.numpy())
    row: dict[str, float] = {"AUC plain": float(roc_auc_score(labels, margins_of(logits["plain"].numpy())))}
    for name, values in logits.items():
        margins = margins_of(values.numpy())
        calibrated = torch.tensor(np.stack([0 * margins, platt.slope * margins + platt.offset], 1))
        for kind, shown in (("", values), (" calibrated", calibrated)):
            row[f"loss{kind} {name}"] = weighted_loss(shown, labels, weights)
            row[f"accuracy{kind} {name}"] = float(balanced_accuracy_score(labels, shown.argmax(1)))
    for figure in ("loss", "accuracy", "loss calibrated", "accuracy calibrated"):
        row[f"{figure} stressed"] = float(np.mean([row[f"{figure} {name}"] for name in STRESSES]))
    return row


def variants(config: TrainConfig, data: Data, machine: Machine) -> Iterator[dict[str, object]]:
    """Train once; a row for each variant."""
    model, _ = ready_model(config, len(data.task.classes), machine.device)
    stages, tracker = config.phases[-1].trainable, NullTracker()
    followed = Followed(model, stages)
    with followed.following():
        records, source = train_model(config, tracker, data, machine, model, click.echo, followed.watch)
    shutil.rmtree(checkpoints_of(config, tracker.run_id))
    outputs = prefix_outputs(model, config, data, machine)
    weights = class_weights(data.part("train")["label"].to_numpy(np.int64))
    best = [record for record in records if record.improved][-1]
    yield {"variant": f"best epoch ({best.epoch})", **judged(model, outputs, weights, stages)}
    for start, average in followed.averages.items():
        yield {"variant": f"from epoch {start}", **judged(average.model, outputs, weights, stages)}
        again = measured_again(average, source, config, machine)
        yield {"variant": f"from epoch {start}, measured again", **judged(again, outputs, weights, stages)}


@click.command()
@click.option("--data-dir", required=True)
@click.option("--weights", default="auto", show_default=True)
@click.option("--strategy", default="partial", show_default=True)
@click.option("--augment", default="crops-2", show_default=True)
@click.option("--lrs", default="5e-4,1e-4", show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--epochs", default=6, show_default=True)
@click.option("--views", default=6, show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--out", type=Path, required=True)
def main(lrs: str, seeds: int, out: Path, **parameters: Any) -> None:
    """Train with each rate and seed, and print the means over seeds."""
    config = TrainConfig(**parameters, select="stressed_val_loss", reuse_gb=12.0)
    machine, data, rows = ready_machine(config), read_data(config), []
    for seed in range(seeds):
        for rate in lrs.split(","):
            chosen = replace(config, seed=seed, lr_top=float(rate))
            rows += [{"lr": rate, "seed": seed, **row} for row in variants(chosen, data, machine)]
            pd.DataFrame(rows).to_csv(out, index=False)
    table = pd.DataFrame(rows)
    table["variant"] = table["variant"].str.replace(r"best epoch.*", "best epoch", regex=True)
    click.echo(table.drop(columns="seed").groupby(["lr", "variant"], sort=False).mean().round(4).T.to_string())


if __name__ == "__main__":
    main()
