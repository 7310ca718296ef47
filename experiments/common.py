"""What the benchmarks share: their task on one data set, a stopwatch, copies of images, and tables."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch import Tensor, nn

from cxr.config import TrainConfig
from cxr.data.kaggle import SUFFIXES, find_root, index_folder
from cxr.data.load import Data
from cxr.data.splits import OFFICIAL, assign_splits
from cxr.errors import UserError
from cxr.machine import Machine, describe, ready_machine
from cxr.network.resnet import ready_model
from cxr.runs.messages import Say
from cxr.runs.resume import checkpoints_of
from cxr.runs.train import train_model
from cxr.tracking.tracker import NullTracker
from cxr.training.loop import EpochRecord

AT_LEAST_1 = click.IntRange(min=1)
Batch = tuple[Tensor, Tensor]
Watch = Callable[[EpochRecord], object]


@dataclass(frozen=True, slots=True)
class Task:
    """What every way of training is given; `table` is the manifest, with splits, of the files under `root`.

    `workers`, `peer_precision` and the fewer epochs are those of the peers; `None` is as many epochs as `config` has.
    """

    config: TrainConfig
    root: Path
    table: pd.DataFrame
    device: torch.device
    workers: int
    peer_precision: str
    peer_epochs: int | None = None
    notebook_epochs: int | None = None

    def images(self, split: str) -> int:
        """The number of images in a split."""
        return int((self.table["split"] == split).sum())


def prepare(config: TrainConfig, copies: int, scratch: Path, **peers: Any) -> Task:
    """Index and split the images once, for all ways; `peers` are the remaining fields of the `Task`.

    Copies go into `scratch`. Raises `UserError` for a folder or a precision that cannot be used.
    """
    root = find_root(config.data_dir)
    if copies > 1:
        root = copy_images(root, copies, scratch)
    config = replace(config, data_dir=str(root))
    table = assign_splits(index_folder(root), config.val_split, config.val_fraction, config.split_seed)
    task = Task(config, root, table, ready_machine(config).device, **peers)
    if task.peer_precision == "bf16" and task.device.type != "cuda":
        raise UserError(f"--peer-precision bf16: on a GPU only; this is {task.device.type}")
    return task


def copy_images(root: Path, copies: int, into: Path) -> Path:
    """Write `copies` files of each image of `root` into the folder `into`, no two with the same bytes; returns `into`.

    Each copy's number is appended to the data, where decoders ignore it, and to the file name, after the part that
    identifies the patient: all copies belong to one patient. If a name identifies none, each copy is its own patient.
    """
    for file in (file for split in OFFICIAL for file in sorted((root / split).glob("*/*"))):
        if file.suffix.lower() in SUFFIXES:
            folder, data = into / file.relative_to(root).parent, file.read_bytes()
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(copies):
                (folder / f"{file.stem}-copy{number}{file.suffix}").write_bytes(data + f"copy {number}".encode())
    return into


def heading(task: Task) -> str:
    """The device, data and settings that the results hold for."""
    config = task.config
    return (
        f"device {describe(task.device)}, torch {torch.__version__}, train {task.images('train')}, "
        f"val {task.images('val')} images\n{config.arch}, {config.image_size} pixels, batches of {config.batch_size}, "
        f"{config.epochs} epochs; precision {ready_machine(config).precision}; peers: {task.peer_precision}, "
        f"{task.workers} workers"
    )


def trained(
    config: TrainConfig, data: Data, machine: Machine, say: Say = click.echo, watch: Watch = lambda record: None
) -> tuple[nn.Module, list[EpochRecord]]:
    """The network of the best epoch, and all epochs: trained without a tracker, its checkpoints removed."""
    model, _ = ready_model(config, len(data.task.classes), machine.device)
    tracker = NullTracker()
    records, _ = train_model(config, tracker, data, machine, model, say, watch)
    shutil.rmtree(checkpoints_of(config, tracker.run_id))
    return model, records


class Laps:
    """A stopwatch: `epochs` in seconds, and `rates` of their training parts in images/s."""

    def __init__(self, device: torch.device, images: int):
        self.device, self.images = device, images
        self.epochs: list[float] = []
        self.rates: list[float] = []
        self.begin()

    def begin(self) -> None:
        """The first epoch begins; each of the others begins where the previous one ended."""
        self.started = now(self.device)

    def trained(self) -> None:
        """The training part of an epoch is over."""
        self.rates.append(self.images / (now(self.device) - self.started))

    def validated(self) -> None:
        """An epoch is over."""
        ended = now(self.device)
        self.epochs.append(ended - self.started)
        self.started = ended


def now(device: torch.device) -> float:
    """The clock in seconds, after the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(table: pd.DataFrame, out: Path | None, decimals: Mapping[str, int] | None = None) -> None:
    """Print the table, and write it to `out` as CSV if that is given.

    `decimals` are those of a column; other numbers have four significant digits, and what is missing is blank.
    """
    formats: Any = {name: f"{{:.{digits}f}}".format for name, digits in (decimals or {}).items()}
    click.echo(table.to_string(index=False, formatters=formats, float_format="{:.4g}".format, na_rep=""))
    if out:
        table.to_csv(out, index=False)
