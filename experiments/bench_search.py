"""What a search costs, with and without reuse of activations, in seconds and in epochs of a notebook's loop.

    uv run python experiments/bench_search.py --data-dir FOLDER --strategy frozen --trials 30 --growth --out growth.csv

Result in LOG.md: "2026-11-22: speed on a CPU, compared with a notebook loop, Lightning and timm", Growth and Search.

Each study runs in its own process, with an empty cache and its own stores. It is timed from indexing the folder to the
last figure, without the refit of the winner; Python's imports and creating the empty MLflow store come before. Trials
are neither pruned nor stopped early, so all have the same number of epochs. The notebook's loop is that of `peers.py`,
in fp32.

`--growth` adds studies with reuse on more images (copies of the files), then with more trials. Their time per image and
trial is given relative to the first of the group; both groups start with the same study, which shows the noise. The
resident memory includes mapped pages of the store and the activations, which the kernel reclaims under pressure.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import pandas as pd
import torch

from common import AT_LEAST_1, Task, copy_images, heading, prepare, report
from cxr.config import TuneConfig, configure
from cxr.machine import peak_memory, reset_peak_memory, resolve_device
from cxr.network.resnet import build_model
from cxr.storage import Cache
from cxr.strategies import STRATEGIES
from peers import notebook_loop

Result = TypeVar("Result")
Row = dict[str, Any]
SINGLE = [name for name, phases in STRATEGIES.items() if len(phases) == 1]
NEVER = 10_000  # epochs of patience: no early stopping
CPU = torch.device("cpu")  # its peak is the memory of the process, whatever device computes


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a study: its seconds, those of the median trial, peak resident memory in MB, stored activations in bytes."""

    seconds: float
    trial: float
    peak: float
    stored: int


@dataclass(frozen=True, slots=True)
class Baseline:
    """What all studies share: the number of images in the folder, the seconds of a notebook's epoch on them, and a
    folder with an empty MLflow store."""

    images: int
    epoch: float
    store: Path


def alone(work: Callable[..., Result], *arguments: object) -> Result:
    """Call `work` in a new process, so that earlier memory and results do not count."""
    context = multiprocessing.get_context("forkserver")  # imports once, and forks before any thread is started
    context.set_forkserver_preload(["cxr.studies.search", "optuna.visualization.matplotlib"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def set_up(work: Path) -> None:
    """Make this process log into `work` and nowhere else."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{work / 'mlflow.db'}"
    os.environ["CXR_CACHE"] = str(work / "cache")
    os.chdir(work)  # MLflow puts artifacts below the working directory


def make_store(work: Path) -> None:
    """Create an empty `mlflow.db` in `work`: that takes seconds, once for each store."""
    set_up(work)
    import mlflow

    from cxr.tracking.store import prepare

    prepare()
    mlflow.search_experiments()


def study(config: TuneConfig, store: Path) -> Cost:
    """Run the search in a new folder, with a copy of the empty MLflow store in `store`."""
    import mlflow
    import optuna

    from cxr.studies.optuna_study import study_name
    from cxr.studies.search import tune_tracked
    from cxr.tracking.store import EXPERIMENT, prepare

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copy(store / "mlflow.db", work)
        set_up(work)
        prepare()
        mlflow.set_experiment(EXPERIMENT)
        torch.zeros(1, device=resolve_device(config.train.device))  # a GPU takes seconds to initialise
        config = config.replace(cache_dir=str(work / "cache"), storage=f"sqlite:///{work / 'optuna.db'}")
        reset_peak_memory(CPU)
        started = time.perf_counter()
        tune_tracked(config, lambda line: None)
        seconds, peak = time.perf_counter() - started, peak_memory(CPU)
        stored = sum(kept.size for kept in Cache(work / "cache").contents(["activations"]))
        trials = optuna.load_study(study_name=study_name(config), storage=config.storage).trials
        durations = [trial.duration.total_seconds() for trial in trials if trial.duration]
        return Cost(seconds, statistics.median(durations), peak, stored)


def notebook_epoch(task: Task, epochs: int) -> float:
    """The median seconds of an epoch of the notebook's loop, validation included."""
    config = replace(task.config, epochs=epochs)
    model, _ = build_model(config.arch, config.weights, config.seed)
    return statistics.median(notebook_loop(replace(task, config=config), model).epochs)


def row(what: str, config: TuneConfig, baseline: Baseline, times: int = 1) -> Row:
    """Run a study on `times` as many images; returns a row of the table."""
    cost = alone(study, config, baseline.store)
    click.echo(f"{what}: {cost.seconds:.1f} s", err=True)
    a_trial, images = cost.seconds / config.trials, baseline.images * times
    return {
        "what": what,
        "images": images,
        "trials": config.trials,
        "s": cost.seconds,
        "s/trial": a_trial,
        "median trial s": cost.trial,
        "notebook epochs": cost.seconds / baseline.epoch,
        "epochs/trial": a_trial / baseline.epoch,
        "ms/image-trial": 1000 * a_trial / images,
        "peak RSS MB": cost.peak,
        "activations MB": cost.stored / 1e6,
    }


def more_images(config: TuneConfig, baseline: Baseline, factors: tuple[int, ...]) -> list[Row]:
    """The same study on several times as many images."""
    rows = []
    for times in factors:
        with tempfile.TemporaryDirectory() as folder:
            copies = copy_images(Path(config.train.data_dir), times, Path(folder))
            rows.append(row(f"images x{times}", config.replace(data_dir=str(copies)), baseline, times))
    return rows


def more_trials(config: TuneConfig, baseline: Baseline, factors: tuple[int, ...]) -> list[Row]:
    """The same study with several times as many trials."""
    return [row(f"trials x{times}", config.replace(trials=config.trials * times), baseline) for times in factors]


def relative(rows: list[Row]) -> list[Row]:
    """The rows with their time per image and trial relative to that of the first."""
    return [each | {"relative": each["ms/image-trial"] / rows[0]["ms/image-trial"]} for each in rows]


def numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """The numbers of an option such as `1,2,4`."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text}: use whole numbers, as in 1,2,4") from error
    if min(found) < 1:
        raise click.BadParameter(f"{text}: the least is 1")
    return found


@click.command()
@click.option("--data-dir", required=True)
@click.option("--strategy", type=click.Choice(SINGLE), default="frozen", show_default=True)
@click.option("--epochs", default=10, show_default=True)
@click.option("--trials", default=30, show_default=True, help="of the study with reuse")
@click.option("--trials-without", default=3, show_default=True, help="of the study without reuse; 0 skips it")
@click.option("--reuse-gb", default=TuneConfig().train.reuse_gb, show_default=True)
@click.option("--notebook-epochs", type=AT_LEAST_1, default=2, show_default=True)
@click.option("--workers", default=os.cpu_count() or 1, show_default="cores", help="of the notebook's DataLoader")
@click.option("--growth", "grow", is_flag=True, help="also measure more images and more trials")
@click.option("--copies", default="1,2,4", show_default=True, callback=numbers, help="factors, with --growth")
@click.option("--growth-trials", type=AT_LEAST_1, help="trials of the first row of --growth; --trials by default")
@click.option("--weights", default="random", show_default=True)
@click.option("--precision", default="auto", show_default=True, help="of cxr; the notebook's loop is fp32")
@click.option("--image-size", default=224, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
def main(
    trials_without: int,
    notebook_epochs: int,
    workers: int,
    grow: bool,
    copies: tuple[int, ...],
    growth_trials: int | None,
    weights: str,
    out: Path | None,
    **parameters: Any,
) -> None:
    """Run the benchmark and print its table."""
    weights = str(Path(weights).absolute()) if Path(weights).is_file() else weights
    options = {"weights": weights, "pruner": "NopPruner", "patience": NEVER, "refit": False, **parameters}
    config = configure(TuneConfig, options)
    task = prepare(config.train, 1, Path(), workers=workers, peer_precision="fp32")
    config = config.replace(data_dir=str(task.root))  # absolute: each study has its own working directory
    images = len(task.table)
    click.echo(f"{heading(task)}\n{os.cpu_count()} cores; {images} images, test included; {config.train.strategy}")
    with tempfile.TemporaryDirectory() as store:
        alone(make_store, Path(store))
        baseline = Baseline(images, notebook_epoch(task, notebook_epochs), Path(store))
        rows: list[Row] = [{"what": f"notebook epoch, {workers} workers", "images": images, "s": baseline.epoch}]
        rows.append(row(f"study, reuse {config.train.reuse_gb:g} GB", config, baseline))
        if trials_without:
            rows.append(row("study, no reuse", config.replace(trials=trials_without, reuse_gb=0.0), baseline))
        if grow:
            first = config.replace(trials=growth_trials or config.trials)
            rows += relative(more_images(first, baseline, copies)) + relative(more_trials(first, baseline, copies))
    report(pd.DataFrame(rows), out)


if __name__ == "__main__":
    main()
