"""Does training on a GPU run, and is it right?

    uv run python experiments/gpu_check.py --data-dir FOLDER --weights FILE
    PYTHONPATH=. python experiments/gpu_check.py …  # where cxr is not installed

Result in LOG.md: "2026-11-26: the GPU path, run for the first time".

Trains on `--images` images of each class and split. The kinds of checks:

- `run`, one epoch of each strategy in each precision, and of each family of networks: does it end;
- `inductor`, likewise with torch.compile;
- `twice`, the same run again: the same bits;
- `graphs`, with and without CUDA graphs: the same bits;
- `resume`, a run broken off after an epoch and continued: the same bits as the whole run;
- `device`, the CPU beside the GPU in fp32: no further apart than two runs on the CPU with one thread and with two,
  which sum in another order (training amplifies what is rounded differently, and Adam's first steps do so at once);
- `views`, augmented images: as the CPU makes them, within a twentieth of a grey level in the mean (what JPEG rounds
  differently shows in a whole block).

Every run proves its freezing as always. Checks run side by side in `--jobs` processes, so that seconds are not speeds.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from common import AT_LEAST_1
from cxr.config import TrainConfig
from cxr.data.batches import eval_batches, grey_batches, make_split, straight_order
from cxr.data.kaggle import SUFFIXES, find_root
from cxr.data.load import read_data
from cxr.data.splits import OFFICIAL
from cxr.data.views import RECIPES, STRESSES, View
from cxr.machine import describe, ready_machine
from cxr.network.freezing import checksum
from cxr.network.inference import infer
from cxr.network.resnet import ready_model
from cxr.runs.resume import checkpoints_of
from cxr.runs.train import train_model
from cxr.strategies import STRATEGIES
from cxr.tracking.tracker import NullTracker
from cxr.training.loop import EpochRecord

KINDS = ("device", "inductor", "graphs", "resume", "twice", "views", "run")
OTHERS = ("resnet50", "densenet121", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t")
LOSSES = ("train_loss", "val_loss")
GREY_APART = 0.05


class BrokenOffError(Exception):
    """Ends a run in the middle, as a kill would."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run came to: losses by epoch [e, 2], probabilities on test [n, k], the checksum of the network."""

    losses: npt.NDArray[np.float64]
    probabilities: npt.NDArray[np.float64]
    checksum: str

    def apart(self, other: Trained) -> tuple[float, float]:
        """The largest differences of losses and probabilities."""
        losses = np.abs(self.losses - other.losses).max()
        return float(losses), float(np.abs(self.probabilities - other.probabilities).max())


def train(config: TrainConfig, break_off_after: int | None = None) -> Trained:
    """Train by `config`; `break_off_after` an epoch, the run is broken off once and continued from its checkpoint."""
    tracker = NullTracker()

    def watch(record: EpochRecord) -> None:
        if record.epoch == break_off_after and not record.restored:
            raise BrokenOffError

    while True:
        machine = ready_machine(config)
        data = read_data(config)
        model, _ = ready_model(config, len(data.task.classes), machine.device)
        try:
            records, _ = train_model(config, tracker, data, machine, model, lambda line: None, watch)
        except BrokenOffError:
            break_off_after = None
            continue
        if break_off_after is not None:
            raise RuntimeError(f"ended before epoch {break_off_after}, where it was to be broken off")
        shutil.rmtree(checkpoints_of(config, tracker.run_id))
        batches = eval_batches(make_split(data.manifest, data.store, "test"), config.batch_size, machine.device)
        logits, _ = infer(model, batches)
        losses = np.array([[record.metrics[name] for name in LOSSES] for record in records])
        return Trained(losses, logits.double().softmax(1).numpy(), checksum(model))


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to check: its kind, a name, and the run."""

    kind: str
    name: str
    config: TrainConfig


def check_run(config: TrainConfig) -> tuple[bool, str]:
    """Whether a run ends, with finite losses."""
    losses = train(config).losses
    return bool(np.isfinite(losses).all()), f"validation loss {losses[-1, 1]:.4f}"


def check_twice(config: TrainConfig) -> tuple[bool, str]:
    """Whether a run gives the same bits twice."""
    return _same(train(config), train(config))


def check_graphs(config: TrainConfig) -> tuple[bool, str]:
    """Whether CUDA graphs change no bit."""
    return _same(train(replace(config, compile="none")), train(replace(config, compile="graphs")))


def check_resume(config: TrainConfig) -> tuple[bool, str]:
    """Whether a run that was broken off and continued gives the same bits as one that was not."""
    return _same(train(config), train(config, break_off_after=len(config.phases)))


def _same(one: Trained, other: Trained) -> tuple[bool, str]:
    if one.checksum == other.checksum and one.apart(other) == (0.0, 0.0):
        return True, "same bits"
    return False, "losses {:.2e}, probabilities {:.2e} apart".format(*one.apart(other))


def check_device(config: TrainConfig) -> tuple[bool, str]:
    """Whether a run on the CPU and on the GPU are as close as runs on the CPU that differ in rounding alone."""
    on_cpu = replace(config, device="cpu")
    here, rounded = train(replace(on_cpu, threads=1)), train(replace(on_cpu, threads=2))
    apart, control = here.apart(train(config)), here.apart(rounded)
    words = "losses {:.1e} and probabilities {:.1e} apart; between one and two threads {:.1e} and {:.1e}"
    close = apart[0] <= control[0] and apart[1] <= control[1]
    return close, words.format(*apart, *control)


def check_views(config: TrainConfig) -> tuple[bool, str]:
    """Whether the GPU makes the views that the CPU makes, for every recipe and stress."""
    device, data = ready_machine(config).device, read_data(config)
    split = make_split(data.manifest, data.store, "val")
    order = straight_order(split, config.batch_size)
    views = [*(View(0, recipe=recipe) for recipe in RECIPES), *(View(stress=stress) for stress in STRESSES)]
    worst, pixels, off, total = 0.0, 0, 0, 0.0
    for view in views:
        both = (grey_batches(split, order, config.seed, view, where) for where in (torch.device("cpu"), device))
        for (here, _), (there, _) in zip(*both, strict=True):
            apart = (here.float() - there.float().cpu()).abs()
            worst, pixels, off = max(worst, apart.max().item()), pixels + apart.numel(), off + int((apart > 0).sum())
            total += apart.sum().item()
    found = f"{total / pixels:.1e} grey levels apart; {off / pixels:.1e} of the pixels differ, by {worst:g} at most"
    return total / pixels < GREY_APART, found


CHECKS: dict[str, Callable[[TrainConfig], tuple[bool, str]]] = {
    "run": check_run,
    "inductor": check_run,
    "graphs": check_graphs,
    "twice": check_twice,
    "resume": check_resume,
    "device": check_device,
    "views": check_views,
}


def cases(base: TrainConfig) -> Iterator[Case]:
    """All cases, the slow ones first."""

    def case(kind: str, **changes: object) -> Case:
        config = replace(base, **changes)  # type: ignore[arg-type]
        return Case(kind, f"{config.arch} {config.strategy} {config.precision}", config)

    yield case("device", strategy="full", precision="fp32", epochs=3)
    yield case("views")
    precisions = ("fp32", "bf16")
    if base.device == "cuda":
        precisions = ("fp32", "bf16", "fp16")
        for arch in ("resnet18", "resnet50", "convnext_tiny"):
            yield case("inductor", arch=arch, strategy="full", compile="inductor", weights="random")
        for arch, strategy in product(reversed(OTHERS), ("full", "partial")):
            yield case("graphs", arch=arch, strategy=strategy, weights="random")
        yield case("graphs", strategy="full", precision="fp16")
        for strategy in STRATEGIES:
            yield case("graphs", strategy=strategy, epochs=3, step_size=2)  # recorded again for another learning rate
    for strategy in STRATEGIES:
        yield case("resume", strategy=strategy, epochs=3)
        yield case("twice", strategy=strategy, epochs=2)
    yield case("twice", strategy="full", precision="fp32", epochs=2)
    for strategy, precision in product(STRATEGIES, precisions):
        yield case("run", strategy=strategy, precision=precision)
    for arch, strategy in product(OTHERS, ("partial", "full")):
        yield case("run", arch=arch, strategy=strategy, weights="random")


def few_images(root: Path, images: int, into: Path) -> Path:
    """Copy `images` of each class and split, spread over their names, into a folder of the same shape; returns it."""
    for folder in (folder for split in OFFICIAL for folder in sorted((root / split).glob("*")) if folder.is_dir()):
        target = into / folder.relative_to(root)
        target.mkdir(parents=True)
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        for file in found[:: max(1, len(found) // images)][:images]:
            shutil.copy(file, target)
    return into


def checked(case: Case) -> dict[str, object]:
    """The row of a case; one that crashed says why, and prints its traceback."""
    started = time.perf_counter()
    try:
        ok, found = CHECKS[case.kind](case.config)
    except Exception as error:
        traceback.print_exc()
        ok, found = False, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:150]}"
    seconds = time.perf_counter() - started
    return {"check": case.kind, "case": case.name, "ok": ok, "found": found, "s": round(seconds, 1)}


def check_all(chosen: list[Case], jobs: int) -> list[dict[str, object]]:
    """The rows of all cases, each printed as it comes."""
    rows = []
    threads = {"initializer": torch.set_num_threads, "initargs": (max(1, (os.cpu_count() or 1) // jobs),)}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), **threads) as pool:  # type: ignore[arg-type]
        for future in as_completed([pool.submit(checked, case) for case in chosen]):
            rows.append(future.result())
            click.echo("{check:7} {case:40} {s:6} s  {ok!s:5}  {found}".format(**rows[-1]))
    return rows


@click.command()
@click.option("--data-dir", required=True, help="Kaggle-shaped folder")
@click.option("--weights", default="random", show_default=True, help="of ResNet18")
@click.option("--device", default="cuda", show_default=True)
@click.option("--precision", default="bf16", show_default=True, help="where a case does not say")
@click.option("--images", type=AT_LEAST_1, default=100, show_default=True, help="of each class and split")
@click.option("--image-size", default=224, show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--jobs", type=AT_LEAST_1, default=1, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
def main(data_dir: str, images: int, kinds: str, jobs: int, out: Path | None, **training: object) -> None:
    """Check all cases, and print those that failed; exit code 1 if there are any."""
    with tempfile.TemporaryDirectory() as work:
        folder = few_images(find_root(data_dir), images, Path(work) / "images")
        config = TrainConfig(
            data_dir=str(folder),
            cache_dir=f"{work}/cache",
            epochs=1,
            views=2,
            **training,  # type: ignore[arg-type]
        )
        chosen = [case for case in cases(config) if case.kind in kinds.split(",")]
        click.echo(f"{describe(ready_machine(config).device)}, torch {torch.__version__}; {len(chosen)} cases")
        read_data(config)  # decoded once for all
        rows = check_all(chosen, jobs)
    failed = [row for row in rows if not row["ok"]]
    if out:
        pd.DataFrame(rows).to_csv(out, index=False)
    click.echo(f"{len(rows) - len(failed)} of {len(rows)} ok")
    for row in failed:
        click.echo("not ok: {check} {case}: {found}".format(**row))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
