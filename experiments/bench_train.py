"""How long a notebook's loop and `cxr` take for the same images, model, epochs and batch size, one after the other.

    uv run python experiments/bench_train.py --data-dir FOLDER --epochs 10

The notebook's loop is the usual one: PIL decodes and augments each image in every epoch (two DataLoader workers),
fp32, the whole network forward in train mode, frozen parameters by `requires_grad`. `cxr` builds its store and
activations inside its time. Prints, for each strategy, the median epoch after the first, the whole run, and the ratios
notebook / cxr; and the ceiling: the same training step on one batch that lies ready in memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import ResNet

from cxr.config import TrainConfig
from cxr.data.augment import IMAGENET_MEAN, IMAGENET_STD
from cxr.data.index import assign_splits, find_root, index_folder
from cxr.inputs import Data, Machine, read_data, ready_machine
from cxr.model import build_model, obey
from cxr.pipeline import train_model
from cxr.strategies import STRATEGIES
from cxr.tracking import NullTracker

SINGLE = ("frozen", "partial", "full")


def configs(data_dir: str, weights: str) -> list[TrainConfig]:
    """One configuration for each strategy of one phase."""
    return [TrainConfig(strategy=s, data_dir=data_dir, weights=weights, patience=10_000) for s in SINGLE]


class Files(Dataset[tuple[torch.Tensor, int]]):
    """Images as a notebook reads them."""

    def __init__(self, root: Path, table: pd.DataFrame, training: bool):
        self.paths, self.labels = [root / p for p in table["path"]], list(table["label"])
        augment = [transforms.RandomAffine(10, (0.05, 0.05), (0.8, 1.25)), transforms.ColorJitter(0.1, 0.3)]
        last = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        self.transform = transforms.Compose([transforms.Resize((224, 224)), *(augment if training else []), *last])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), int(self.labels[index])


def notebook(config: TrainConfig, model: ResNet) -> list[float]:
    """The seconds of each epoch, validation included."""
    root = find_root(config.data_dir)
    table = assign_splits(index_folder(root), config.val_split, config.val_fraction, config.split_seed)
    parts = [Files(root, table[table["split"] == name], name == "train") for name in ("train", "val")]
    train, val = (DataLoader(p, config.batch_size, shuffle=i == 0, num_workers=2) for i, p in enumerate(parts))
    obey(model, config.phases[0])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], config.rates()[0])
    seconds = []
    for _ in range(config.epochs):
        started = time.perf_counter()
        model.train()  # as notebooks do: BatchNorm of the frozen part trains on
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for images, _ in val:
                model(images)
        seconds.append(time.perf_counter() - started)
    return seconds


def ours(config: TrainConfig, data: Data, machine: Machine, model: ResNet) -> list[float]:
    """The seconds of each epoch, validation included."""
    model.to(device=machine.device, memory_format=torch.channels_last)
    records, _ = train_model(config, NullTracker(), data, machine, model, lambda line: None)
    return [record.metrics["epoch_seconds"] + record.metrics["eval_seconds"] for record in records]


def ceiling(config: TrainConfig, machine: Machine) -> float:
    """Images/s of the training step of `full` on one batch that lies ready."""
    model, _ = build_model(config.arch, "random", 0)
    model.to(device=machine.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(obey(model, STRATEGIES["full"][0]), fused=True)
    images = torch.randn(config.batch_size, 3, 224, 224, device=machine.device).to(memory_format=torch.channels_last)
    labels = torch.zeros(config.batch_size, dtype=torch.int64, device=machine.device)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.precision == "bf16"):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return config.batch_size / statistics.median(times[2:])


def timed(work: Callable[[], list[float]]) -> tuple[float, float]:
    """(whole seconds, median seconds of the epochs after the first)."""
    started = time.perf_counter()
    epochs = work()
    return time.perf_counter() - started, statistics.median(epochs[1:] or epochs)


def compare(config: TrainConfig) -> dict[str, object]:
    """One row of the table: both ways, the notebook first."""
    whole_theirs, epoch_theirs = timed(lambda: notebook(config, build_model(config.arch, config.weights, 0)[0]))

    def work() -> list[float]:
        machine = ready_machine(config)
        return ours(config, read_data(config), machine, build_model(config.arch, config.weights, 0)[0])

    whole, epoch = timed(work)
    return {
        "strategy": config.strategy,
        "notebook epoch s": round(epoch_theirs, 2),
        "cxr epoch s": round(epoch, 4),
        "epoch ratio": round(epoch_theirs / epoch, 1),
        "notebook run s": round(whole_theirs, 1),
        "cxr run s": round(whole, 1),
        "run ratio": round(whole_theirs / whole, 2),
    }


@click.command()
@click.option("--data-dir", required=True)
@click.option("--weights", default="random", show_default=True)
@click.option("--epochs", default=10, show_default=True)
@click.option("--precision", default="auto", show_default=True, help="of cxr; the notebook's loop is fp32")
def main(data_dir: str, weights: str, epochs: int, precision: str) -> None:
    """Run the benchmark and print its table."""
    from dataclasses import replace

    rows = []
    for config in configs(data_dir, weights):
        with tempfile.TemporaryDirectory() as cache:  # nothing is there before
            rows.append(compare(replace(config, epochs=epochs, precision=precision, cache_dir=cache)))
        click.echo(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1))
    machine = ready_machine(replace(configs(data_dir, weights)[0], precision=precision))
    click.echo(f"ceiling of a full training step ({machine.precision}): {ceiling(config, machine):.1f} images/s")


if __name__ == "__main__":
    main()
