"""How fast images reach the network, in images/s: as a notebook reads them and as `cxr` does.

    uv run python experiments/bench_input.py --data-dir FOLDER --images 2000

Result in LOG.md: "2026-11-22: speed on a CPU, compared with a notebook loop, Lightning and timm", Input.

All ways take turns, `--repeats` times, so that a machine that slows down slows all of them; the table holds medians.
The ratio is the rate over that of a notebook without workers, which decodes and augments each image in every epoch.
Indexing reads all files before the first turn, so they come from the page cache. DataLoader workers stay alive between
turns. Stored activations are random numbers of the right shape, of ResNet18 in the default precision of `cxr`; on a GPU
they are in its memory, as the images are.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from common import AT_LEAST_1, Batch, report
from cxr.data.batches import Split, epoch_order, eval_batches, make_split, view_batches
from cxr.data.kaggle import digest_files, find_root, index_folder
from cxr.data.store import Store, open_store
from cxr.data.views import View
from cxr.machine import describe, eval_batch_size, resolve_device, resolve_precision, seed_everything
from cxr.network.resnet import build_model
from cxr.network.stages import run_stages
from cxr.storage import Cache
from cxr.strategies import STRATEGIES
from cxr.training.frozen_prefix import look_up
from cxr.training.row_file import RowFile
from peers import Files

Job = Callable[[int], int]  # number of the repeat -> number of images that were read
DECIMALS = {"median s": 4, "min s": 4, "max s": 4, "images/s": 1, "ratio": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Bench:
    """The images and the settings of the measurement; `work` is an empty folder for the store and the activations."""

    root: Path
    table: pd.DataFrame
    size: int
    batch_size: int
    workers: int
    device: torch.device
    work: Path

    @property
    def paths(self) -> list[Path]:
        """The files, in the table's order."""
        return [self.root / path for path in self.table["path"]]

    def store(self, cache: Path) -> Store:
        """The decoded images: opened in that cache folder, or decoded into it."""
        return open_store(self.paths, list(self.table["digest"]), self.size, "squash", Cache(cache))


def choose(table: pd.DataFrame, most: int | None) -> pd.DataFrame:
    """At most `most` different images, spread evenly over the table, which is sorted by class."""
    table = table.drop_duplicates("digest")
    rows = np.linspace(0, len(table) - 1, min(most or len(table), len(table))).astype(int)
    return table.iloc[rows].assign(split="all")


def count(batches: Iterable[Batch], device: torch.device) -> int:
    """Move the batches to the device; returns the number of images."""
    return sum(len(inputs.to(device, non_blocking=True)) for inputs, _ in batches)


def notebook_jobs(bench: Bench) -> dict[str, Job]:
    """Reading as in a notebook; the first job is the baseline."""

    def job(training: bool, workers: int) -> Job:
        files = Files(bench.root, bench.table, bench.size, training)
        pin, keep = bench.device.type == "cuda", workers > 0
        loader = DataLoader(
            files, bench.batch_size, shuffle=training, num_workers=workers, pin_memory=pin, persistent_workers=keep
        )
        return lambda repeat: count(loader, bench.device)

    return {
        "notebook: PIL and transforms": job(True, 0),
        "notebook: the same without augmentation": job(False, 0),
        f"notebook: PIL and transforms, {bench.workers} workers": job(True, bench.workers),
    }


def store_jobs(bench: Bench) -> dict[str, Job]:
    """What `cxr` does before the first epoch."""

    def build(repeat: int) -> int:
        return len(bench.store(bench.work / f"fresh-{repeat}").images)

    return {
        "cxr, each run: indexing (sha256 of the files)": lambda repeat: len(digest_files(bench.paths)),
        "cxr, once: decoding into the store": build,
        "cxr, each run: opening the store": lambda repeat: len(bench.store(bench.work).images),
    }


def batch_jobs(bench: Bench, split: Split) -> dict[str, Job]:
    """What `cxr` does in an epoch without reuse."""

    def views(repeat: int) -> int:
        order = epoch_order(len(split), bench.batch_size, 0, repeat)
        return count(view_batches(split, order, 0, View(repeat), bench.device), bench.device)

    def plain(repeat: int) -> int:
        return count(eval_batches(split, eval_batch_size(bench.device, bench.batch_size), bench.device), bench.device)

    return {"cxr, epoch: views from the store": views, "cxr, epoch: without augmentation": plain}


def kept_jobs(bench: Bench, split: Split, strategy: str) -> dict[str, Job]:
    """What `cxr` does in an epoch with reuse, and when a run opens activations that another has stored."""
    shape, dtype = shape_of(strategy, bench.size), DTYPES[resolve_precision("auto", bench.device)]
    rows = np.arange(len(split))
    file = RowFile(bench.work / strategy, len(rows), shape, dtype)
    for some in np.split(rows, range(64, len(rows), 64)):
        file.write(some, torch.rand(len(some), *shape).to(dtype))
    values = file.values.to(bench.device)

    def open_rows(repeat: int) -> int:
        missing = RowFile(bench.work / strategy, len(rows), shape, dtype).missing(rows)
        return len(rows) - len(missing)

    def look_up_rows(repeat: int) -> int:
        order = epoch_order(len(rows), bench.batch_size, 0, repeat)
        return count(look_up(values, torch.from_numpy(rows), split, order), bench.device)

    opening = {f"cxr, each run: opening kept activations, {strategy}": open_rows} if bench.device.type == "cpu" else {}
    return {**opening, f"cxr, epoch: kept activations, {strategy} {'x'.join(map(str, shape))}": look_up_rows}


def shape_of(strategy: str, size: int) -> tuple[int, ...]:
    """The shape [c, h, w] of the activations that a strategy stores for an image."""
    model, _ = build_model("resnet18", "random", 0)
    phase = STRATEGIES[strategy][0]
    with torch.no_grad():
        features = run_stages(model.eval(), torch.zeros(1, 3, size, size), phase.frozen)
    return tuple((model.avgpool(features) if phase.first == "fc" else features).shape[1:])


def measure(jobs: dict[str, Job], repeats: int, device: torch.device) -> pd.DataFrame:
    """A row for each job: its seconds, its rate in images/s, and the ratio to the rate of the first job."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    images: dict[str, int] = {}
    for repeat in range(repeats):
        for name, job in jobs.items():
            started = time.perf_counter()
            images[name] = job(repeat)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = [images[name] / medians[name] for name in jobs]
    rows = {
        "what": list(jobs),
        "median s": medians.values(),
        "min s": map(min, seconds.values()),
        "max s": map(max, seconds.values()),
        "images/s": rates,
        "ratio": [rate / rates[0] for rate in rates],
    }
    return pd.DataFrame({name: list(column) for name, column in rows.items()})


def run(bench: Bench, repeats: int) -> pd.DataFrame:
    """The table of all jobs on these images."""
    store = bench.store(bench.work)
    if store.bad:
        raise click.ClickException(f"{len(store.bad)} images cannot be decoded: {'; '.join(set(store.bad.values()))}")
    split = make_split(bench.table, store, "all")
    jobs = {**notebook_jobs(bench), **store_jobs(bench), **batch_jobs(bench, split)}
    for strategy in ("frozen", "partial"):
        jobs |= kept_jobs(bench, split, strategy)
    return measure(jobs, repeats, bench.device)


@click.command()
@click.option("--data-dir", required=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--images", type=click.IntRange(2), help="at most this many; all by default")
@click.option("--workers", default=os.cpu_count() or 1, show_default="cores", help="of the notebook's DataLoader")
@click.option("--device", default="auto", show_default=True)
@click.option("--repeats", type=AT_LEAST_1, default=5, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
def main(
    data_dir: str,
    image_size: int,
    batch_size: int,
    images: int | None,
    workers: int,
    device: str,
    repeats: int,
    out: Path | None,
) -> None:
    """Run the benchmark and print its table."""
    root, where = find_root(data_dir), resolve_device(device)
    seed_everything(0, where)  # as in training; this also selects deterministic kernels
    whole = index_folder(root)
    table = choose(whole, images)
    click.echo(f"{describe(where)}, torch {torch.__version__}, {os.cpu_count()} cores")
    click.echo(f"{len(table)} of {len(whole)} images at {image_size} pixels, batches of {batch_size}")
    with tempfile.TemporaryDirectory() as work:
        rows = run(Bench(root, table, image_size, batch_size, workers, where, Path(work)), repeats)
    report(rows, out, DECIMALS)


if __name__ == "__main__":
    main()
