"""What it costs to bring images to the network, in images/s: a notebook's way and `cxr`'s, one after the other.

    uv run python experiments/bench_input.py --data-dir FOLDER --images 2000

Every way takes its turn in each of the `--repeats`, so that a machine that slows down slows all of them; medians.
The ratio is the rate over that of a notebook without workers, which decodes and augments each image in every epoch.
Indexing has read all files before the first turn, so that they come from the page cache. The workers of the DataLoader
stay alive between its turns. Kept activations are random numbers of the right shape, of resnet18 in the precision
that `cxr` takes by default; on a GPU they lie, as the images do, in its memory.
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
from torch import Tensor
from torch.utils.data import DataLoader

from cxr.data.batches import Split, epoch_order, eval_batches, make_split, view_batches
from cxr.data.kaggle import digest_files, find_root, index_folder
from cxr.data.store import Store, open_store
from cxr.machine import describe, eval_batch_size, resolve_device, resolve_precision, seed_everything
from cxr.network.resnet import build_model, run_stages
from cxr.strategies import STRATEGIES
from cxr.training.frozen_prefix import look_up
from cxr.training.row_file import RowFile

Batch = tuple[Tensor, Tensor]
Job = Callable[[int], int]  # number of the repeat -> images that were brought
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Bench:
    """The images, and how they are to be brought; `work` is a folder to fill."""

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
        """The decoded images, from that cache folder or built into it."""
        return open_store(self.paths, list(self.table["digest"]), self.size, "squash", cache)


def choose(table: pd.DataFrame, most: int | None) -> pd.DataFrame:
    """At most so many different images, spread evenly over the folder: the classes lie one after the other."""
    table = table.drop_duplicates("digest")
    rows = np.linspace(0, len(table) - 1, min(most or len(table), len(table))).astype(int)
    return table.iloc[rows].assign(split="all")


def count(batches: Iterable[Batch], device: torch.device) -> int:
    """Take the batches to the device; how many images there were."""
    return sum(len(inputs.to(device, non_blocking=True)) for inputs, _ in batches)


def notebook_jobs(bench: Bench) -> dict[str, Job]:
    """What a notebook does; the first is the baseline."""
    from bench_train import Files

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
    """What a run of `cxr` does before its first epoch."""

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
        return count(view_batches(split, order, 0, repeat, bench.device), bench.device)

    def plain(repeat: int) -> int:
        return count(eval_batches(split, eval_batch_size(bench.device, bench.batch_size), bench.device), bench.device)

    return {"cxr, epoch: views from the store": views, "cxr, epoch: without augmentation": plain}


def kept_jobs(bench: Bench, split: Split, strategy: str) -> dict[str, Job]:
    """What `cxr` does in an epoch with reuse, and when a run opens what another has kept."""
    shape, dtype = shape_of(strategy, bench.size), DTYPES[resolve_precision("auto", bench.device)]
    rows = np.arange(len(split))
    file = RowFile(bench.work / strategy, len(rows), shape, dtype)
    for some in np.split(rows, range(64, len(rows), 64)):
        file.write(some, torch.rand(len(some), *shape).to(dtype))
    values = file.values.to(bench.device)

    def opened(repeat: int) -> int:
        missing = RowFile(bench.work / strategy, len(rows), shape, dtype).missing(rows)
        return len(rows) - len(missing)

    def looked_up(repeat: int) -> int:
        order = epoch_order(len(rows), bench.batch_size, 0, repeat)
        return count(look_up(values, torch.from_numpy(rows), split, order), bench.device)

    shelf = {f"cxr, each run: opening kept activations, {strategy}": opened} if bench.device.type == "cpu" else {}
    return {**shelf, f"cxr, epoch: kept activations, {strategy} {'x'.join(map(str, shape))}": looked_up}


def shape_of(strategy: str, size: int) -> tuple[int, ...]:
    """The shape [c, h, w] that a strategy keeps of an image."""
    model, _ = build_model("resnet18", "random", 0)
    phase = STRATEGIES[strategy][0]
    with torch.no_grad():
        features = run_stages(model.eval(), torch.zeros(1, 3, size, size), phase.frozen)
    return tuple((model.avgpool(features) if phase.first == "fc" else features).shape[1:])


def measure(jobs: dict[str, Job], repeats: int, device: torch.device) -> pd.DataFrame:
    """A row for each job: its seconds, its rate, and the ratio to the rate of the first."""
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


def show(table: pd.DataFrame) -> str:
    """For people."""
    formats = dict.fromkeys(("median s", "min s", "max s"), "{:.4f}".format)
    return table.to_string(index=False, formatters={**formats, "images/s": "{:.1f}".format, "ratio": "{:.2f}".format})


def run(bench: Bench, repeats: int) -> pd.DataFrame:
    """All jobs on these images."""
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
@click.option("--images", type=click.IntRange(2), help="at most so many; all by default")
@click.option("--workers", default=os.cpu_count() or 1, show_default="cores", help="of the notebook's DataLoader")
@click.option("--device", default="auto", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="write the table there, as CSV")
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
    seed_everything(0, where)  # as in training, with the kernels that this chooses
    whole = index_folder(root)
    table = choose(whole, images)
    click.echo(f"{describe(where)}, torch {torch.__version__}, {os.cpu_count()} cores")
    click.echo(f"{len(table)} of {len(whole)} images at {image_size} pixels, batches of {batch_size}")
    with tempfile.TemporaryDirectory() as work:  # nothing is there before
        rows = run(Bench(root, table, image_size, batch_size, workers, where, Path(work)), repeats)
    click.echo(show(rows))
    if out:
        rows.to_csv(out, index=False)


if __name__ == "__main__":
    main()
