"""How long training takes by `cxr` and in the usual ways: same images, split, initial weights, epochs, batch size.

    uv run python experiments/bench_train.py --data-dir FOLDER --epochs 10 --repeats 3
    uv run --group bench python experiments/bench_train.py --data-dir FOLDER --peers notebook,lightning,timm
    PYTHONPATH=. python experiments/bench_train.py …  # where cxr is not installed; needs torch, torchvision, click,
                                                      # pandas, scikit-learn, matplotlib, safetensors and tqdm

Result in LOG.md: "2026-11-22: speed on a CPU, compared with a notebook loop, Lightning and timm", Training.

The ways: `notebook`, the usual loop (PIL decodes and augments each image in every epoch, the whole network runs in
train mode, parameters are frozen by `requires_grad`); `lightning`, the same in a LightningModule; `timm`, the same in a
loop like that of timm's train.py; `cxr`, `train_model` with an empty cache folder, so that its time includes decoding
and activations; `ceiling`, only the training step of what the strategy trains, repeated on one batch that is already on
the device, in the precision and with the settings of `cxr`, compiled alike.

In each round, every way runs once for each strategy, one after the other. The table holds medians over rounds; a ratio
is the notebook's seconds over this way's in the same round. The seconds of an epoch are wall-clock time from the end of
the previous one, validation and everything else included (in `cxr`: proof of freezing, checkpoint); images/s are those
of the training part. Reading the file list and the split counts for `cxr` but not for the peers. On a CPU, peak memory
is that of this process, without DataLoader workers.
"""

from __future__ import annotations

import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torchvision.models import ResNet

from common import AT_LEAST_1, Laps, Task, heading, now, prepare, report, trained
from cxr.config import TrainConfig
from cxr.data.load import read_data
from cxr.errors import UserError
from cxr.machine import peak_memory, ready_machine, reset_peak_memory
from cxr.network.freezing import apply_phase
from cxr.network.resnet import build_model
from cxr.runs.train import train_model
from cxr.strategies import STRATEGIES
from cxr.tracking.tracker import NullTracker
from cxr.training.faster import Compiled, RecordedStep, Step, Suffix
from cxr.training.loop import EpochRecord
from peers import LOOPS, autocast, require_installed

PEERS = tuple(LOOPS)
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
WARMUP = 5  # steps before a ceiling is timed; graphs are recorded in the fourth
CEILING_SECONDS = 2.0


def cxr_loop(task: Task, model: ResNet) -> Laps:
    """Train by `cxr`, decoding included, with the cache folder of the configuration."""
    machine = ready_machine(task.config)
    data = read_data(task.config)
    model.to(device=machine.device, memory_format=torch.channels_last)
    laps = Laps(machine.device, task.images("train"))

    def watch(record: EpochRecord) -> None:
        laps.rates.append(record.metrics["images_per_second"])
        laps.validated()

    train_model(task.config, NullTracker(), data, machine, model, lambda line: None, watch)
    return laps


WAYS: dict[str, Callable[[Task, ResNet], Laps]] = {**LOOPS, "cxr": cxr_loop}


def measure(task: Task, way: str) -> dict[str, float]:
    """Train once, in a cache folder of its own; returns columns of the table.

    There is no "run s" if the way trains fewer epochs than the task has.
    """
    model, _ = build_model(task.config.arch, task.config.weights, task.config.seed)
    fewer = {"cxr": None, "notebook": task.notebook_epochs}.get(way, task.peer_epochs)
    epochs = fewer or task.config.epochs
    gc.collect()  # the previous way's garbage would count as this one's memory
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


def training_step(task: Task) -> Callable[[], None]:
    """A function that does one training step of what the strategy trains, on its precomputed input on the device."""
    machine, config, phase = ready_machine(task.config), task.config, task.config.phases[0]
    model, _ = build_model(config.arch, "random", 0)
    model.to(device=machine.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(apply_phase(model, phase), config.rates()[0], fused=True)
    suffix = Suffix(model, phase.trainable)
    network = Compiled(suffix) if machine.compile == "inductor" else suffix
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    step = Step(network, optimizer, scaler, torch.ones(2, device=machine.device), machine.precision)
    before = Suffix(model, phase.frozen)
    images = torch.randn(config.batch_size, 3, config.image_size, config.image_size, device=machine.device)
    labels = torch.arange(config.batch_size, device=machine.device) % 2
    with torch.no_grad(), autocast(machine.device, machine.precision):
        features = before(images.contiguous(memory_format=torch.channels_last))
    return functools.partial(RecordedStep(step) if machine.compile == "graphs" else step, features, labels)


def ceiling(task: Task) -> float:
    """Images/s of `training_step`: the median over blocks of steps; the device is synchronised after each block."""
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
    """A row for each strategy and way. The ceiling comes first, which warms up the device for the others."""
    for strategy in strategies:
        of_strategy = replace(task, config=replace(task.config, strategy=strategy))
        yield {"strategy": strategy, "way": "ceiling", "images/s": ceiling(of_strategy)}
        for way in ways:
            yield {"strategy": strategy, "way": way, **measure(of_strategy, way)}


def all_rounds(task: Task, strategies: tuple[str, ...], ways: tuple[str, ...], repeats: int) -> pd.DataFrame:
    """A row for each round, strategy and way; each is printed to stderr when it is measured."""
    rows = []
    for number in range(repeats):
        for row in one_round(task, strategies, ways):
            rows.append({"round": number, **row})
            values = ", ".join(f"{name} {row[name]:.{digits}f}" for name, digits in DECIMALS.items() if name in row)
            click.echo(f"round {number + 1}, {row['strategy']}, {row['way']}: {values}", err=True)
    return pd.DataFrame(rows)


def summarise(rounds: pd.DataFrame) -> pd.DataFrame:
    """A row for each strategy and way: ratios within each round, then medians over rounds."""
    rounds, at = rounds.copy(), pd.MultiIndex.from_frame(rounds[["round", "strategy"]])

    def matching(way: str, column: str) -> Any:
        of_way = rounds[rounds["way"] == way].set_index(["round", "strategy"])[column]
        return of_way.reindex(at).to_numpy()

    for kind in ("epoch", "run"):
        rounds[f"{kind} ratio"] = matching("notebook", f"{kind} s") / rounds[f"{kind} s"]
    rounds["of ceiling"] = rounds["images/s"] / matching("ceiling", "images/s")
    return rounds.groupby(["strategy", "way"], sort=False)[list(DECIMALS)].median().reset_index()


def time_all(config: TrainConfig, seeds: int) -> float:
    """Seconds that all strategies take with `seeds` seeds each, sharing one cache that is empty at first."""
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        for strategy, seed in product(STRATEGIES, range(seeds)):
            single = replace(config, strategy=strategy, seed=seed, cache_dir=cache)
            machine = ready_machine(single)
            trained(single, read_data(single), machine, lambda line: None)
        return time.perf_counter() - started


def chosen(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """The names in `text`, in the order of `known`. Raises `UserError` for an unknown one."""
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise UserError(f"{option} {text}: {', '.join(sorted(unknown))} unknown; choose from {', '.join(known)}")
    return tuple(name for name in known if name in names)


@click.command()
@click.option("--data-dir", required=True, help="Kaggle-shaped folder")
@click.option("--strategies", default=",".join(SINGLE), show_default=True)
@click.option("--peers", default="notebook", show_default=True, help=f"some of {', '.join(PEERS)}, or none")
@click.option("--repeats", type=AT_LEAST_1, default=1, show_default=True, help="rounds")
@click.option("--epochs", default=10, show_default=True)
@click.option("--peer-epochs", type=AT_LEAST_1, help="fewer epochs for lightning and timm, which then have no run s")
@click.option("--notebook-epochs", type=AT_LEAST_1, help="fewer epochs for the notebook, which then has no run s")
@click.option("--copies", type=AT_LEAST_1, default=1, show_default=True, help="copies of each image")
@click.option("--arch", default="resnet18", show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True, help="of cxr and the ceiling")
@click.option("--compile", default="auto", show_default=True, help="of cxr and the ceiling")
@click.option("--peer-precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--reuse-gb", default=4.0, show_default=True, help="of cxr; a phase that needs more stores nothing")
@click.option("--weights", default="random", show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=os.cpu_count(), show_default=True, help="of the peers")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
@click.option("--all-strategies-seeds", type=AT_LEAST_1, help="also time all strategies with this many seeds")
def main(
    strategies: str,
    peers: str,
    repeats: int,
    copies: int,
    out: Path | None,
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
            report(table, out, DECIMALS)
            if seeds := all_strategies_seeds:
                click.echo(f"{len(STRATEGIES)} strategies x {seeds} seeds by cxr: {time_all(task.config, seeds):.1f} s")
    except UserError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
