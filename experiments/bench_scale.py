"""What grows with the number of films, and how: seconds and peak memory of each step on 6,000 to 96,000 of them.

    uv run python experiments/bench_scale.py --films 6000,24000,96000

Result in LOG.md: "2026-11-26: from 6,000 to 96,000 films, again".

The films are made: smooth random fields as JPEG of 224 pixels, four for each patient, a tenth of them test. Each step
is a process of its own on the same cache folder: index (digests of all files), decode, audit, open again (index and
store, both known), one epoch of `frozen` from random weights (ResNet18, 64 pixels, to be within minutes), and
prediction of all test films. The audit meets random fields, which are hardly ever alike; X-rays are more alike and
give more candidates for near duplicates. A step's growth is its seconds per film over those of the smallest number.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import numpy as np
import pandas as pd
from PIL import Image

from common import report
from cxr.config import TrainConfig
from cxr.data.batches import eval_batches, make_split
from cxr.data.load import read_data, source_of
from cxr.data.memory import Memory
from cxr.machine import peak_memory, ready_machine, reset_peak_memory
from cxr.network.inference import infer
from cxr.network.resnet import build_model
from cxr.runs.audit import audited
from cxr.runs.train import train_model
from cxr.storage import Cache
from cxr.tracking.tracker import NullTracker

SIZE, COARSE = 224, 12


def make_films(root: Path, films: int) -> None:
    """Write them in the Kaggle layout."""
    draw = np.random.default_rng(0)
    for number in range(films):
        patient = number // 4
        split, name = ("test" if patient % 20 < 2 else "train"), ("PNEUMONIA" if patient % 2 else "NORMAL")
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        field = Image.fromarray(draw.integers(0, 256, (COARSE, COARSE), dtype=np.uint8))
        stem = f"IM-{patient:06}-{number:07}" if name == "NORMAL" else f"person{patient}_virus_{number}"
        field.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{stem}.jpeg", quality=80)


def index(config: TrainConfig) -> None:
    """Digests of all files, remembered."""
    source_of(config, Memory.of(Cache.open(config.cache_dir)))


def decode(config: TrainConfig) -> None:
    """Decode, split; what is known of the files is used."""
    read_data(config)


def audit(config: TrainConfig) -> None:
    """All checks, with the network's features."""
    data, machine = read_data(config), ready_machine(config)
    model, _ = build_model(config.arch, config.weights, config.seed)
    audited(config, data, model, machine.precision)


def epoch(config: TrainConfig) -> None:
    """One epoch of `frozen`."""
    data, machine = read_data(config), ready_machine(config)
    model, _ = build_model(config.arch, config.weights, config.seed)
    train_model(config, NullTracker(), data, machine, model, lambda line: None)


def predict(config: TrainConfig) -> None:
    """The logits of all test films."""
    data, machine = read_data(config), ready_machine(config)
    model, _ = build_model(config.arch, config.weights, config.seed)
    infer(model, eval_batches(make_split(data.manifest, data.store, "test"), config.batch_size, machine.device))


STEPS: dict[str, Callable[[TrainConfig], None]] = {
    "index": index,
    "decode": decode,
    "audit": audit,
    "open again": decode,
    "epoch of frozen": epoch,
    "predict test": predict,
}


def timed(step: str, config: TrainConfig) -> tuple[float, float]:
    """(seconds, peak resident memory in MB) of a step, imports left out."""
    device = ready_machine(config).device
    reset_peak_memory(device)
    started = time.perf_counter()
    STEPS[step](config)
    return time.perf_counter() - started, peak_memory(device)


@click.command()
@click.option("--films", default="6000,24000,96000", show_default=True)
@click.option("--steps", default=",".join(STEPS), show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
def main(films: str, steps: str, out: Path | None) -> None:
    """Run all steps for each number and print the table."""
    rows: list[dict[str, object]] = []
    first: dict[str, float] = {}
    for number in map(int, films.split(",")):
        with tempfile.TemporaryDirectory() as work:
            make_films(Path(work) / "films", number)
            config = TrainConfig(
                data_dir=f"{work}/films",
                cache_dir=f"{work}/cache",
                weights="random",
                strategy="frozen",
                image_size=64,
                epochs=1,
                device="cpu",
            )
            time.sleep(2.5)  # files changed just now are not remembered
            for step in steps.split(","):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    seconds, peak = pool.submit(timed, step, config).result()
                growth = seconds / number / first.setdefault(step, seconds / number)
                rows.append({"films": number, "step": step, "s": seconds, "growth a film": growth, "peak MB": peak})
                click.echo(rows[-1], err=True)
    report(pd.DataFrame(rows), out, {"s": 1, "growth a film": 2, "peak MB": 0})


if __name__ == "__main__":
    main()
