"""How long training takes in the usual ways and in `cxr`: same images, split, initial weights, epochs, batch size.

    uv run python experiments/bench_train.py --data-dir FOLDER --epochs 10 --repeats 3
    uv run --group bench python experiments/bench_train.py --data-dir FOLDER --peers notebook,lightning,timm
    PYTHONPATH=. python experiments/bench_train.py …  # where cxr is not installed: torch, torchvision, click, pandas,
                                                      # scikit-learn, matplotlib, safetensors and tqdm will do

The ways: `notebook`, the usual loop (PIL decodes and augments each image in every epoch, the whole network forward in
train mode, frozen parameters by `requires_grad`); `lightning`, the same in a LightningModule; `timm`, the same in the
manner of timm's train.py; `cxr`, `train_model` with an empty cache folder, so that decoding and activations are inside
its time; `ceiling`, the training step of what the strategy trains, on one batch that lies ready on the device, in the
arithmetic and with the settings of `cxr`.

In each round every way runs once for each strategy, one after the other; the table holds medians over rounds, its
ratios are the notebook's seconds / this way's in the same round. Epochs are wall clock from the end of one to the end
of the next, validation included, with all that a way does between them (`cxr`: proof of freezing, checkpoint); images/s
are those of the training part. Reading the file list and the split is outside the peers' time and inside `cxr`'s. On a
CPU, peak memory is this process's, without DataLoader workers.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import ResNet

from cxr.config import TrainConfig
from cxr.data.kaggle import SUFFIXES, find_root, index_folder
from cxr.data.load import read_data
from cxr.data.splits import OFFICIAL, assign_splits
from cxr.data.views import IMAGENET_MEAN, IMAGENET_STD
from cxr.errors import UserError
from cxr.machine import describe, peak_memory, ready_machine, reset_peak_memory
from cxr.network.freezing import apply_phase
from cxr.network.resnet import build_model
from cxr.runs.train import train_model
from cxr.strategies import STRATEGIES
from cxr.tracking.tracker import NullTracker
from cxr.training.loop import EpochRecord

SINGLE = ("frozen", "partial", "full")
DECIMALS = {
    "first epoch s": 2,
    "epoch s": 4,
    "images/s": 1,
    "run s": 2,
    "epoch ratio": 2,
    "run ratio": 2,
    "of ceiling": 3,
    "peak MB": 0,
}
WARMUP = 3  # steps before a ceiling is timed
CEILING_SECONDS = 2.0
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Task:
    """What every way is given; `table` is the split manifest of the files under `root`."""

    config: TrainConfig
    root: Path
    table: pd.DataFrame
    device: torch.device
    workers: int
    peer_precision: str
    peer_epochs: int | None
    notebook_epochs: int | None = None

    def images(self, split: str) -> int:
        """How many images a split has."""
        return int((self.table["split"] == split).sum())


class Laps:
    """A stopwatch: seconds of each epoch, and images/s of its training part."""

    def __init__(self, device: torch.device, images: int):
        self.device, self.images = device, images
        self.epochs: list[float] = []
        self.rates: list[float] = []
        self.begin()

    def begin(self) -> None:
        """The first epoch begins; the others begin where the one before ends."""
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
    """The clock, once the device has done what it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Files(Dataset[tuple[Tensor, int]]):
    """Images as a notebook reads them."""

    def __init__(self, root: Path, table: pd.DataFrame, size: int, training: bool):
        self.paths, self.labels = [root / p for p in table["path"]], list(table["label"])
        augment = [transforms.RandomAffine(10, (0.05, 0.05), (0.8, 1.25)), transforms.ColorJitter(0.1, 0.3)]
        last = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        self.transform = transforms.Compose([transforms.Resize((size, size)), *(augment if training else []), *last])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), int(self.labels[index])


def loaders(task: Task, persistent: bool = False) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The peers' batches, (train, val). As in `cxr`, a last training batch of one image is left out."""
    train, val = (
        Files(task.root, task.table[task.table["split"] == name], task.config.image_size, name == "train")
        for name in ("train", "val")
    )
    load = partial(
        DataLoader,
        batch_size=task.config.batch_size,
        num_workers=task.workers,
        pin_memory=task.device.type == "cuda",
        persistent_workers=persistent and task.workers > 0,
        # Python 3.14 would start each worker anew, which would flatter cxr.
        multiprocessing_context="fork" if task.workers > 0 and sys.platform == "linux" else None,
    )
    single = len(train) % task.config.batch_size == 1
    return load(train, shuffle=True, drop_last=single), load(val)


def moved(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device."""
    for images, labels in batches:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def mixed(device: torch.device, precision: str) -> torch.autocast:
    """The context for an arithmetic: `fp32`, `bf16` or `fp16`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def as_torch_comes(device: torch.device) -> None:
    """Undo what `ready_machine` sets for `cxr`, and would otherwise bind the peers: determinism, no TF32."""
    if device.type == "cuda":
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = True


def trainable(task: Task, model: ResNet) -> list[nn.Parameter]:
    """Freeze by `requires_grad` alone and return the rest, on the device.

    All in train mode, as notebooks do: BatchNorm of the frozen part trains on.
    """
    as_torch_comes(task.device)
    parameters = apply_phase(model.to(task.device), task.config.phases[0])
    model.train()
    return parameters


def notebook(task: Task, model: ResNet) -> Laps:
    """The usual loop."""
    (train, val), device = loaders(task), task.device
    optimizer = torch.optim.Adam(trainable(task, model), task.config.rates()[0])
    laps = Laps(device, task.images("train"))
    for _ in range(task.config.epochs):
        model.train()
        for images, labels in moved(train, device):
            optimizer.zero_grad()
            with mixed(device, task.peer_precision):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        laps.trained()
        model.eval()
        with torch.no_grad(), mixed(device, task.peer_precision):
            for images, _ in moved(val, device):
                model(images)
        laps.validated()
    return laps


def lightning_module(model: ResNet, optimizer: torch.optim.Optimizer, laps: Laps) -> Any:
    """The network as a LightningModule that keeps the time of its epochs."""
    import lightning

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Batch, index: int) -> None:
            self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def on_train_start(self) -> None:
            laps.begin()

        def on_validation_start(self) -> None:
            laps.trained()

        def on_train_epoch_end(self) -> None:  # Lightning validates before it
            laps.validated()

    return Classifier()


def lightning_trainer(task: Task) -> Any:
    """A Trainer that trains and validates, and does nothing else."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # which the import has set lower
    return lightning.Trainer(
        accelerator=task.device.type,
        devices=1,
        precision="bf16-mixed" if task.peer_precision == "bf16" else "32-true",
        max_epochs=task.config.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def lightning_loop(task: Task, model: ResNet) -> Laps:
    """Lightning's Trainer."""
    optimizer = torch.optim.Adam(trainable(task, model), task.config.rates()[0])
    laps = Laps(task.device, task.images("train"))
    module = lightning_module(model, optimizer, laps)
    with warnings.catch_warnings():  # it has advice on workers and train mode, which are what they are on purpose
        warnings.simplefilter("ignore")
        lightning_trainer(task).fit(module, *loaders(task))
    return laps


def timm_loop(task: Task, model: ResNet) -> Laps:
    """In the manner of timm's train.py: its optimizer factory and meters, and workers that stay."""
    from timm.optim import create_optimizer_v2

    train, val = loaders(task, persistent=True)
    optimizer = create_optimizer_v2(trainable(task, model), opt="adam", lr=task.config.rates()[0])
    laps = Laps(task.device, task.images("train"))
    for _ in range(task.config.epochs):
        timm_train(task, model, train, optimizer)
        laps.trained()
        timm_validate(task, model, val)
        laps.validated()
    return laps


def timm_train(task: Task, model: ResNet, batches: DataLoader[Any], optimizer: torch.optim.Optimizer) -> float:
    """`train_one_epoch`: the loss is read in every step. Returns its mean."""
    from timm.utils import AverageMeter

    losses, update_time, data_time = AverageMeter(), AverageMeter(), AverageMeter()
    model.train()
    optimizer.zero_grad()
    started = time.time()
    for images, labels in moved(batches, task.device):
        data_time.update(time.time() - started)
        with mixed(task.device, task.peer_precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        update_time.update(time.time() - started)
        started = time.time()
    return float(losses.avg)


def timm_validate(task: Task, model: ResNet, batches: DataLoader[Any]) -> tuple[float, float]:
    """`validate`: (mean loss, accuracy in percent), read in every step."""
    from timm.utils import AverageMeter, accuracy

    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        for images, labels in moved(batches, task.device):
            with mixed(task.device, task.peer_precision):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            (right,) = accuracy(logits, labels, topk=(1,))
            losses.update(loss.item(), len(images))
            top1.update(right.item(), len(images))
    return float(losses.avg), float(top1.avg)


def ours(task: Task, model: ResNet) -> Laps:
    """`cxr`, from files on; the configuration names the cache folder."""
    machine = ready_machine(task.config)
    data = read_data(task.config)
    model.to(device=machine.device, memory_format=torch.channels_last)
    laps = Laps(machine.device, task.images("train"))

    def watch(record: EpochRecord) -> None:
        laps.rates.append(record.metrics["images_per_second"])
        laps.validated()

    train_model(task.config, NullTracker(), data, machine, model, lambda line: None, watch)
    return laps


WAYS: dict[str, Callable[[Task, ResNet], Laps]] = {
    "notebook": notebook,
    "lightning": lightning_loop,
    "timm": timm_loop,
    "cxr": ours,
}
PEERS = tuple(WAYS)[:-1]
OPTIONAL = ("lightning", "timm")  # peers named as the package that they need


def measure(task: Task, way: str) -> dict[str, float]:
    """One run of a way in a cache folder of its own, as the table's columns."""
    model, _ = build_model(task.config.arch, task.config.weights, task.config.seed)
    fewer = {"cxr": None, "notebook": task.notebook_epochs}.get(way, task.peer_epochs)
    epochs = fewer or task.config.epochs
    gc.collect()  # what the way before left would count as this one's memory
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(task.device)
    with tempfile.TemporaryDirectory() as cache:
        started = now(task.device)
        laps = WAYS[way](replace(task, config=replace(task.config, cache_dir=cache, epochs=epochs)), model)
        seconds = now(task.device) - started
    figures = {
        "first epoch s": laps.epochs[0],
        "epoch s": statistics.median(laps.epochs[1:] or laps.epochs),
        "images/s": statistics.median(laps.rates[1:] or laps.rates),
        "peak MB": peak_memory(task.device),
    }
    return figures | ({"run s": seconds} if epochs == task.config.epochs else {})


def cut(model: ResNet, first: str) -> tuple[nn.Sequential, nn.Sequential]:
    """(what is before, what is from the stage `first` on), with the modules of the model."""
    modules = dict(model.named_children())
    names = list(modules)
    at = names.index("conv1" if first == "stem" else first)
    after = [modules[name] for name in names[at:-1]]
    return nn.Sequential(*(modules[name] for name in names[:at])), nn.Sequential(*after, nn.Flatten(), modules["fc"])


def training_step(task: Task) -> Callable[[], None]:
    """One step of what the strategy trains, on what would enter it, ready on the device."""
    machine, config, phase = ready_machine(task.config), task.config, task.config.phases[0]
    model, _ = build_model(config.arch, "random", 0)
    model.to(device=machine.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(apply_phase(model, phase), config.rates()[0], fused=True)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    before, after = cut(model, phase.first)
    images = torch.randn(config.batch_size, 3, config.image_size, config.image_size, device=machine.device)
    labels = torch.arange(config.batch_size, device=machine.device) % 2
    with torch.no_grad(), mixed(machine.device, machine.precision):
        features = before(images.contiguous(memory_format=torch.channels_last))

    def step() -> None:
        with mixed(machine.device, machine.precision):
            logits = after(features).float()
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def ceiling(task: Task) -> float:
    """Images/s of `training_step`: the median over blocks of steps, the device waited for after each block."""
    step, block = training_step(task), 20 if task.device.type == "cuda" else 2
    for _ in range(WARMUP):
        step()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < CEILING_SECONDS:
        started = now(task.device)
        for _ in range(block):
            step()
        seconds.append(now(task.device) - started)
    return block * task.config.batch_size / statistics.median(seconds)


def one_round(task: Task, strategies: tuple[str, ...], ways: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A row for each strategy and way. The ceiling comes first, and so warms the device up for all that follow."""
    for strategy in strategies:
        of_strategy = replace(task, config=replace(task.config, strategy=strategy))
        yield {"strategy": strategy, "way": "ceiling", "images/s": ceiling(of_strategy)}
        for way in ways:
            yield {"strategy": strategy, "way": way, **measure(of_strategy, way)}


def all_rounds(task: Task, strategies: tuple[str, ...], ways: tuple[str, ...], repeats: int) -> pd.DataFrame:
    """A row for each round, strategy and way; each is told on stderr once it is there."""
    rows = []
    for number in range(repeats):
        for row in one_round(task, strategies, ways):
            rows.append({"round": number, **row})
            told = ", ".join(f"{name} {row[name]:.{digits}f}" for name, digits in DECIMALS.items() if name in row)
            click.echo(f"round {number + 1}, {row['strategy']}, {row['way']}: {told}", err=True)
    return pd.DataFrame(rows)


def summarise(rounds: pd.DataFrame) -> pd.DataFrame:
    """The table: ratios within each round, then medians over rounds."""
    rounds, at = rounds.copy(), pd.MultiIndex.from_frame(rounds[["round", "strategy"]])

    def beside(way: str, column: str) -> Any:
        of_way = rounds[rounds["way"] == way].set_index(["round", "strategy"])[column]
        return of_way.reindex(at).to_numpy()

    for kind in ("epoch", "run"):
        rounds[f"{kind} ratio"] = beside("notebook", f"{kind} s") / rounds[f"{kind} s"]
    rounds["of ceiling"] = rounds["images/s"] / beside("ceiling", "images/s")
    return rounds.groupby(["strategy", "way"], sort=False)[list(DECIMALS)].median().reset_index()


def time_all(config: TrainConfig, seeds: int) -> float:
    """Seconds of every strategy with so many seeds, one after the other, with one cache that is empty at first."""
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        for strategy, seed in product(STRATEGIES, range(seeds)):
            single = replace(config, strategy=strategy, seed=seed, cache_dir=cache)
            machine = ready_machine(single)
            data = read_data(single)
            model, _ = build_model(single.arch, single.weights, single.seed)
            model.to(device=machine.device, memory_format=torch.channels_last)
            train_model(single, NullTracker(), data, machine, model, lambda line: None)
        return time.perf_counter() - started


def copied(root: Path, copies: int, into: Path) -> Path:
    """A folder with so many copies of each image of `root`, no two the same bytes.

    The number follows the end of the image, where no decoder looks, and what the name tells of the patient, so that
    all copies are the same patient's. A name that tells no patient makes each copy a patient of its own.
    """
    for file in (file for split in OFFICIAL for file in sorted((root / split).glob("*/*"))):
        if file.suffix.lower() in SUFFIXES:
            folder, data = into / file.relative_to(root).parent, file.read_bytes()
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(copies):
                (folder / f"{file.stem}-copy{number}{file.suffix}").write_bytes(data + f"copy {number}".encode())
    return into


def prepare(config: TrainConfig, copies: int, scratch: Path, **peers: Any) -> Task:
    """Index and split once, for all ways; `peers` are the remaining fields of the `Task`."""
    root = find_root(config.data_dir)
    if copies > 1:
        root = copied(root, copies, scratch)
    config = replace(config, data_dir=str(root))
    table = assign_splits(index_folder(root), config.val_split, config.val_fraction, config.split_seed)
    task = Task(config, root, table, ready_machine(config).device, **peers)
    if task.peer_precision == "bf16" and task.device.type != "cuda":
        raise UserError(f"--peer-precision bf16: on a GPU only; this is {task.device.type}")
    return task


def chosen(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """The names in `text`, in the order of `known`."""
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise UserError(f"{option} {text}: {', '.join(sorted(unknown))} unknown; join some of {', '.join(known)}")
    return tuple(name for name in known if name in names)


def require_installed(peers: tuple[str, ...]) -> None:
    """Raise `UserError` for a peer whose package is not there."""
    if missing := [peer for peer in peers if peer in OPTIONAL and importlib.util.find_spec(peer) is None]:
        raise UserError(
            f"--peers {','.join(peers)}: {', '.join(missing)} not installed; "
            "use uv run --group bench python experiments/bench_train.py …"
        )


def heading(task: Task) -> str:
    """What the figures hold for."""
    config = task.config
    return (
        f"device {describe(task.device)}, torch {torch.__version__}, train {task.images('train')}, "
        f"val {task.images('val')} images\n{config.arch}, {config.image_size} pixels, batches of {config.batch_size}, "
        f"{config.epochs} epochs; precision {ready_machine(config).precision}, of peers {task.peer_precision}, "
        f"with {task.workers} workers"
    )


def shown(table: pd.DataFrame) -> str:
    """The table as text; what does not apply is blank."""
    formats: Any = {name: f"{{:.{digits}f}}".format for name, digits in DECIMALS.items()}
    return table.to_string(index=False, formatters=formats, na_rep="")


AT_LEAST_1 = click.IntRange(min=1)


@click.command()
@click.option("--data-dir", required=True, help="Kaggle-shaped folder")
@click.option("--strategies", default=",".join(SINGLE), show_default=True)
@click.option("--peers", default="notebook", show_default=True, help=f"some of {', '.join(PEERS)}, or none")
@click.option("--repeats", type=AT_LEAST_1, default=1, show_default=True, help="rounds")
@click.option("--epochs", default=10, show_default=True)
@click.option("--peer-epochs", type=AT_LEAST_1, help="fewer epochs for lightning and timm, without a whole run")
@click.option("--notebook-epochs", type=AT_LEAST_1, help="fewer epochs for the notebook, without a whole run")
@click.option("--copies", type=AT_LEAST_1, default=1, show_default=True, help="of each image")
@click.option("--arch", default="resnet18", show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True, help="of cxr and of the ceiling")
@click.option("--compile", default="none", show_default=True, help="of cxr: inductor, graphs or none")
@click.option("--peer-precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--reuse-gb", default=4.0, show_default=True, help="of cxr; a phase that needs more keeps nothing")
@click.option("--weights", default="random", show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=os.cpu_count(), show_default=True, help="of the peers")
@click.option("--out", type=click.Path(dir_okay=False), help="the table as CSV, too")
@click.option("--all-strategies-seeds", type=AT_LEAST_1, help="time all four strategies with so many seeds, too")
def main(
    strategies: str,
    peers: str,
    repeats: int,
    copies: int,
    out: str | None,
    all_strategies_seeds: int | None,
    peer_epochs: int | None,
    notebook_epochs: int | None,
    peer_precision: str,
    workers: int,
    **training: Any,
) -> None:
    """Run the benchmark and print its table."""
    try:
        ways = () if peers == "none" else chosen(peers, PEERS, "--peers")
        require_installed(ways)
        config = TrainConfig(patience=10_000, **training)
        with tempfile.TemporaryDirectory() as scratch:
            fewer = {"peer_epochs": peer_epochs, "notebook_epochs": notebook_epochs}
            task = prepare(config, copies, Path(scratch), workers=workers, peer_precision=peer_precision, **fewer)
            click.echo(heading(task))
            table = summarise(all_rounds(task, chosen(strategies, SINGLE, "--strategies"), (*ways, "cxr"), repeats))
            click.echo(shown(table))
            if out:
                table.to_csv(out, index=False)
            if seeds := all_strategies_seeds:
                click.echo(f"{len(STRATEGIES)} strategies x {seeds} seeds by cxr: {time_all(task.config, seeds):.1f} s")
    except UserError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
