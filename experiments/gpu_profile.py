"""Where the time of a training epoch goes on a GPU, and which settings pay.

    uv run python experiments/gpu_profile.py --data-dir FOLDER

Result in LOG.md: "2026-11-26: the GPU path, run for the first time".

Trains `--strategy` on the whole data set without a tracker. First decoding into an empty cache; then each way to
compile with each batch size: the first epoch (which pays for compiling, and for views made for the first time), the
median of the others, and what they give in images/s; then kept views against views made in each epoch; then one epoch
under `torch.profiler`: the time that kernels ran, kernels by step, waits of the host, and what took longest.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from common import AT_LEAST_1, Watch, report, trained
from cxr.config import TrainConfig
from cxr.data.load import Data, read_data
from cxr.errors import UserError
from cxr.machine import describe, memory_errors, peak_memory, ready_machine, reset_peak_memory
from cxr.training.loop import EpochRecord

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def train(config: TrainConfig, data: Data, watch: Watch = lambda record: None) -> list[float]:
    """The seconds of each epoch, everything included: training, validation, proof of freezing, checkpoint."""
    ends = [time.perf_counter()]

    def note(record: EpochRecord) -> None:
        ends.append(time.perf_counter())  # an epoch ends with its metrics on the host
        watch(record)

    trained(config, data, ready_machine(config), lambda line: None, note)
    return [end - begin for begin, end in pairwise(ends)]


def timed(config: TrainConfig, data: Data) -> dict[str, object]:
    """A row of the table; one that runs out of memory or cannot be compiled says so."""
    device = ready_machine(config).device
    row = {"compile": config.compile, "batch": config.batch_size, "views": "kept" if config.reuse_gb else "made anew"}
    reset_peak_memory(device)
    try:
        with memory_errors():
            seconds = train(config, data)
    except (UserError, RuntimeError) as error:
        return {**row, "error": str(error).splitlines()[0][:80]}
    later = statistics.median(seconds[1:])
    images = len(data.part("train"))
    figures = {"first epoch s": seconds[0], "epoch s": later, "all s": sum(seconds), "images/s": images / later}
    return {**row, **figures, "peak MB": peak_memory(device)}


def decoding(config: TrainConfig) -> float:
    """Images/s, from files to the store, by all cores."""
    with tempfile.TemporaryDirectory() as empty:
        started = time.perf_counter()
        data = read_data(replace(config, cache_dir=empty))
        return len(data.manifest) / (time.perf_counter() - started)


def profiled(config: TrainConfig, data: Data) -> tuple[dict[str, float], pd.DataFrame]:
    """(figures of the third epoch, the kernels that took longest)."""
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    watching, moments = profile(activities=[activity], acc_events=True), []

    def watch(record: EpochRecord) -> None:
        if record.epoch == 1:
            watching.start()
            moments.append(time.perf_counter())
        if record.epoch == 2:
            moments.append(time.perf_counter())
            watching.stop()

    train(replace(config, epochs=3), data, watch)
    kernels, names, spent = _counted(watching.events(), activity)
    busy = sum(spent.values()) / 1e6
    figures = {
        "epoch s (profiled)": moments[1] - moments[0],
        "kernels ran s": busy,
        "kernels a step": kernels / (len(data.part("train")) / config.batch_size),
        "copies to the host": sum(number for name, number in names.items() if "DtoH" in name),
        "copies from the host": sum(number for name, number in names.items() if "HtoD" in name),
        "waits": sum(names[name] for name in WAITS),
    }
    longest = [(name[:90], took / 1e3, took / 1e6 / busy) for name, took in spent.most_common(14)]
    return figures, pd.DataFrame(longest, columns=["longest", "ms", "share"])


def _counted(events: Any, activity: ProfilerActivity) -> tuple[int, Counter[str], Counter[str]]:
    """(how many kernels ran, events by name, microseconds by name of what ran on the device)."""
    names, spent, kernels = Counter[str](), Counter[str](), 0
    for event in events:
        names[event.name] += 1
        if event.device_type.name == activity.name:
            kernels += "Mem" not in event.name
            spent[event.name] += (
                event.self_cpu_time_total if activity is ProfilerActivity.CPU else event.self_device_time_total
            )
    return kernels, names, spent


@click.command()
@click.option("--data-dir", required=True, help="Kaggle-shaped folder")
@click.option("--strategy", default="full", show_default=True)
@click.option("--arch", default="resnet18", show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--compile", "compiles", default="none,graphs,inductor", show_default=True)
@click.option("--batch-sizes", default="32,64,128,256,512", show_default=True)
@click.option("--epochs", type=AT_LEAST_1, default=4, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
def main(compiles: str, batch_sizes: str, epochs: int, out: Path | None, **training: Any) -> None:
    """Run everything and print it."""
    with tempfile.TemporaryDirectory() as cache:
        config = TrainConfig(weights="random", views=2, epochs=epochs, patience=10_000, cache_dir=cache, **training)
        click.echo(f"{describe(ready_machine(config).device)}, torch {torch.__version__}, {os.cpu_count()} cores")
        click.echo(f"decoding: {decoding(config):.0f} images/s")
        data = read_data(config)
        train(replace(config, epochs=2), data)  # warms up
        rows = []
        sizes = [int(size) for size in batch_sizes.split(",")]
        for how, size in product(compiles.split(","), sizes):
            rows.append(timed(replace(config, compile=how, batch_size=size), data))
            click.echo(rows[-1], err=True)
        rows.append(timed(replace(config, reuse_gb=0.0), data))
        report(pd.DataFrame(rows), out, {"peak MB": 0})
        for how in compiles.split(",")[:2]:
            figures, longest = profiled(replace(config, compile=how), data)
            click.echo(f"\ncompile {how}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
            click.echo(longest.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
