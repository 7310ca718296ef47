"""What logging costs an epoch: through the outbox, straight to the store, and not at all.

    uv run python experiments/bench_outbox.py

Trains `frozen` from kept activations on phantoms, whose epochs are so short that logging would show, in turn: without a
tracker, logging straight to a new SQLite store (as before there was an outbox), and through the outbox. Prints seconds
an epoch from the first record to the last, the median over rounds, and the ratios. Result in docs/reliability.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from common import AT_LEAST_1
from cxr.config import TrainConfig
from cxr.data.load import read_data
from cxr.data.phantoms import write_synthetic
from cxr.machine import ready_machine
from cxr.network.resnet import ready_model
from cxr.runs.train import train_model
from cxr.tracking.lifecycle import open_run
from cxr.tracking.tracker import NullTracker, Tracker

WAYS = ("not logged", "straight", "outbox")


@contextmanager
def tracker_of(way: str, work: Path) -> Iterator[Tracker]:
    """What the run logs to."""
    if way == "not logged":
        yield NullTracker()
        return
    outbox = (lambda run_id: work / "outbox" / run_id) if way == "outbox" else None
    with open_run(way.replace(" ", "-"), outbox=outbox) as tracker:
        yield tracker


def seconds(config: TrainConfig, way: str, work: Path) -> float:
    """Seconds an epoch, first to last record."""
    machine, data, times = ready_machine(config), read_data(config), list[float]()
    model, _ = ready_model(config, len(data.task.classes), machine.device)
    with tracker_of(way, work) as tracker:
        train_model(
            config,
            tracker,
            data,
            machine,
            model,
            say=lambda line: None,
            watch=lambda record: times.append(time.perf_counter()),
        )
    return (times[-1] - times[0]) / (len(times) - 1)


@click.command()
@click.option("--rounds", type=AT_LEAST_1, default=5, show_default=True)
@click.option("--epochs", type=click.IntRange(min=2), default=40, show_default=True)
def main(rounds: int, epochs: int) -> None:
    """Measure all ways in turn, and print medians and ratios."""
    import mlflow

    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = write_synthetic(work)
        mlflow.set_tracking_uri(f"sqlite:///{work}/mlflow.db")
        options = {"data_dir": str(data), "weights": "random", "image_size": 64, "cache_dir": str(work / "cache")}
        config = TrainConfig(strategy="frozen", epochs=epochs, patience=epochs, **options)  # type: ignore[arg-type]
        seconds(config, "not logged", work)  # computes and keeps the activations
        for _ in range(rounds):
            for way in WAYS:
                found[way].append(seconds(config, way, work))
    medians = {way: statistics.median(times) for way, times in found.items()}
    for way, median in medians.items():
        spread = f"{min(found[way]):.4f} to {max(found[way]):.4f}"
        click.echo(f"{way:<11} {median:.4f} s an epoch ({spread}), {median / medians['straight']:.2f} of straight")


if __name__ == "__main__":
    main()
