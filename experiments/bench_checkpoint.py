"""How long training waits for its checkpoints: written while the next epoch trains, or before it begins.

    uv run python experiments/bench_checkpoint.py --epoch-seconds 1

Result in LOG.md: "2026-11-22: checkpoints written while the next epoch trains".

An epoch is simulated by sleeping, as if a GPU did the work. A real training loop also needs the Python interpreter that
the writing thread uses, so the gain is an upper bound. After each epoch, the state of `full` (weights and Adam's
moments) is saved, and the weights once more as the best so far. The two ways take turns; the table holds medians, and
the ratio of the seconds that an epoch takes in all. What is measured is the disk of `--folder`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import pandas as pd
import torch
from torchvision.models import get_model

from common import report
from cxr.machine import describe, resolve_device
from cxr.training.checkpoint import Checkpoints


def trained(arch: str, device: torch.device) -> tuple[torch.nn.Module, torch.optim.Adam]:
    """A network and its optimizer after one step."""
    model = get_model(arch, weights=None, num_classes=2).to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def seconds(
    checkpoints: Checkpoints, model: torch.nn.Module, optimizer: torch.optim.Adam, epoch: int, rest: float, wait: bool
) -> float:
    """Seconds that saving delays the loop in one epoch; what is not on disk by the end of the epoch is waited for."""
    started = time.perf_counter()
    best = checkpoints.save_tensors(f"best-{epoch}", model.state_dict())
    checkpoints.save({"tensors": model.state_dict(), "optimizer": optimizer.state_dict()}, keep={best})
    if wait:
        checkpoints.flush()
    held_up = time.perf_counter() - started
    time.sleep(rest)
    started = time.perf_counter()
    checkpoints.flush()
    return held_up + time.perf_counter() - started


@click.command()
@click.option("--arch", "archs", multiple=True, default=("resnet18", "resnet50"), show_default=True)
@click.option("--epoch-seconds", type=click.FloatRange(0), default=1.0, show_default=True)
@click.option("--epochs", type=click.IntRange(2), default=10, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="where to write; a temporary folder by default")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
def main(
    archs: tuple[str, ...], epoch_seconds: float, epochs: int, device: str, folder: Path | None, out: Path | None
) -> None:
    """Run the benchmark and print its table."""
    where, rows = resolve_device(device), []
    for arch in archs:
        model, optimizer = trained(arch, where)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            ways = {name: Checkpoints(Path(work) / name) for name in ("waited for", "while training")}
            found: dict[str, list[float]] = {name: [] for name in ways}
            for epoch in range(epochs):
                for name, checkpoints in ways.items():
                    wait = name == "waited for"
                    found[name].append(seconds(checkpoints, model, optimizer, epoch, epoch_seconds, wait))
            base = epoch_seconds + statistics.median(found["waited for"][1:])
            for name, each in found.items():
                held_up = statistics.median(each[1:])  # a run always waits for its first state
                rows.append((arch, name, held_up, base / (epoch_seconds + held_up)))
    table = pd.DataFrame(rows, columns=["network", "checkpoint", "s held up", "ratio"])
    click.echo(f"{describe(where)}, torch {torch.__version__}, epochs of {epoch_seconds:g} s")
    report(table, out, {"s held up": 3, "ratio": 3})


if __name__ == "__main__":
    main()
