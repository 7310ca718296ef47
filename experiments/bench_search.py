"""What a search costs, with and without reuse of activations, in seconds and in epochs of a notebook's loop.

    uv run python experiments/bench_search.py --data-dir FOLDER --strategy frozen --trials 30 --growth --out growth.csv

Each study runs in a process of its own, with an empty cache and stores of its own. Its time is that from indexing the
folder to the last figure, without the winner's refit; making the empty MLflow store, and Python's imports, come before.
Trials are neither pruned nor stopped early, so that every one has the same epochs. The notebook's loop is that of
`bench_train.py`, in fp32.

`--growth` adds studies with reuse on more images (copies of the files), then with more trials. Their time for an image
and a trial is given relative to the first of the group; the same study begins both, which shows the noise. The resident
memory counts mapped pages of the store and the shelf, which the kernel takes back when it is short.
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
from typing import TYPE_CHECKING, Any, TypeVar

import click
import pandas as pd
import torch

from cxr.config import TuneConfig, configure
from cxr.machine import peak_memory, reset_peak_memory, resolve_device
from cxr.network.resnet import build_model
from cxr.storage import Cache
from cxr.strategies import STRATEGIES

if TYPE_CHECKING:
    from bench_train import Task

Result = TypeVar("Result")
Row = dict[str, Any]
SINGLE = [name for name, phases in STRATEGIES.items() if len(phases) == 1]
NEVER = 10_000  # epochs of patience
CPU = torch.device("cpu")  # whose peak is the process's, whatever computes


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a study: seconds, the median trial's seconds, the peak of resident memory in MB, bytes on the shelf."""

    seconds: float
    trial: float
    peak: float
    shelf: int


@dataclass(frozen=True, slots=True)
class Ground:
    """What all studies are held against or begin with: how many images the folder has, the seconds of a notebook's
    epoch on them, and the folder of an empty MLflow store."""

    images: int
    epoch: float
    tables: Path


def alone(work: Callable[..., Result], *arguments: object) -> Result:
    """Call it in a new process, so that neither memory nor what was computed before it counts."""
    context = multiprocessing.get_context("forkserver")  # imports once; what it forks has no threads yet
    context.set_forkserver_preload(["cxr.search", "optuna.visualization.matplotlib"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def set_up(work: Path) -> None:
    """This process logs into `work` and nowhere else."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{work / 'mlflow.db'}"
    os.environ["CXR_CACHE"] = str(work / "cache")
    os.chdir(work)  # MLflow puts artifacts below the working folder


def make_tables(work: Path) -> None:
    """Make `mlflow.db`, empty: that takes seconds, once in the life of a store."""
    set_up(work)
    import mlflow

    from cxr.tracking.store import prepare

    prepare()
    mlflow.search_experiments()


def study(config: TuneConfig, tables: Path) -> Cost:
    """Run the search in a fresh folder, with an MLflow store that has its `tables` already."""
    import mlflow
    import optuna

    from cxr.studies.optuna_study import study_name
    from cxr.studies.search import tune_tracked
    from cxr.tracking.store import EXPERIMENT, prepare

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copy(tables / "mlflow.db", work)
        set_up(work)
        prepare()
        mlflow.set_experiment(EXPERIMENT)
        torch.zeros(1, device=resolve_device(config.train.device))  # a GPU takes seconds to begin
        config = config.replace(cache_dir=str(work / "cache"), storage=f"sqlite:///{work / 'optuna.db'}")
        reset_peak_memory(CPU)
        started = time.perf_counter()
        tune_tracked(config, lambda line: None)
        seconds, peak = time.perf_counter() - started, peak_memory(CPU)
        shelf = sum(kept.size for kept in Cache(work / "cache").contents(["activations"]))
        trials = optuna.load_study(study_name=study_name(config), storage=config.storage).trials
        durations = [trial.duration.total_seconds() for trial in trials if trial.duration]
        return Cost(seconds, statistics.median(durations), peak, shelf)


def notebook_epoch(task: Task, epochs: int) -> float:
    """The median seconds of an epoch of the notebook's loop, validation included."""
    from bench_train import notebook

    config = replace(task.config, epochs=epochs)
    model, _ = build_model(config.arch, config.weights, config.seed)
    return statistics.median(notebook(replace(task, config=config), model).epochs)


def row(what: str, config: TuneConfig, ground: Ground, times: int = 1) -> Row:
    """Run a study, on so many times the images; a line of the table."""
    cost = alone(study, config, ground.tables)
    click.echo(f"{what}: {cost.seconds:.1f} s", err=True)
    a_trial, images = cost.seconds / config.trials, ground.images * times
    return {
        "what": what,
        "images": images,
        "trials": config.trials,
        "s": cost.seconds,
        "s/trial": a_trial,
        "median trial s": cost.trial,
        "notebook epochs": cost.seconds / ground.epoch,
        "epochs/trial": a_trial / ground.epoch,
        "ms/image-trial": 1000 * a_trial / images,
        "peak RSS MB": cost.peak,
        "shelf MB": cost.shelf / 1e6,
    }


def more_images(config: TuneConfig, ground: Ground, factors: tuple[int, ...]) -> list[Row]:
    """The same study on so many times the images."""
    from bench_train import copied

    rows = []
    for times in factors:
        with tempfile.TemporaryDirectory() as folder:
            copies = copied(Path(config.train.data_dir), times, Path(folder))
            rows.append(row(f"images x{times}", config.replace(data_dir=str(copies)), ground, times))
    return rows


def more_trials(config: TuneConfig, ground: Ground, factors: tuple[int, ...]) -> list[Row]:
    """The same study with so many times the trials."""
    return [row(f"trials x{times}", config.replace(trials=config.trials * times), ground) for times in factors]


def relative(rows: list[Row]) -> list[Row]:
    """With the time for an image and a trial over that of the first row."""
    return [each | {"relative": each["ms/image-trial"] / rows[0]["ms/image-trial"]} for each in rows]


def numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """What `1,2,4` says."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text}: write whole numbers, as in 1,2,4") from error
    if min(found) < 1:
        raise click.BadParameter(f"{text}: from 1 on")
    return found


def show(table: pd.DataFrame) -> str:
    """For people."""
    return table.to_string(index=False, na_rep="", float_format="{:.4g}".format)


@click.command()
@click.option("--data-dir", required=True)
@click.option("--strategy", type=click.Choice(SINGLE), default="frozen", show_default=True)
@click.option("--epochs", default=10, show_default=True)
@click.option("--trials", default=30, show_default=True, help="of the study with reuse")
@click.option("--trials-without", default=3, show_default=True, help="of the study without; 0 leaves it out")
@click.option("--reuse-gb", default=4.0, show_default=True)
@click.option("--notebook-epochs", type=click.IntRange(1), default=2, show_default=True)
@click.option("--workers", default=os.cpu_count() or 1, show_default="cores", help="of the notebook's DataLoader")
@click.option("--growth", "grow", is_flag=True, help="measure more images and more trials, too")
@click.option("--copies", default="1,2,4", show_default=True, callback=numbers, help="so many times, with --growth")
@click.option("--growth-trials", type=click.IntRange(1), help="trials of its first row; those of --trials by default")
@click.option("--weights", default="random", show_default=True)
@click.option("--precision", default="auto", show_default=True, help="of cxr; the notebook's loop is fp32")
@click.option("--image-size", default=224, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="write the table there, as CSV")
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
    from bench_train import heading, prepare

    weights = str(Path(weights).absolute()) if Path(weights).is_file() else weights
    options = {"weights": weights, "pruner": "NopPruner", "patience": NEVER, "refit": False, **parameters}
    config = configure(TuneConfig, options)
    task = prepare(config.train, 1, Path(), workers=workers, peer_precision="fp32", peer_epochs=None)
    config = config.replace(data_dir=str(task.root))  # absolute: studies have working folders of their own
    images = len(task.table)
    click.echo(f"{heading(task)}\n{os.cpu_count()} cores; {images} images with those of test; {config.train.strategy}")
    with tempfile.TemporaryDirectory() as tables:
        alone(make_tables, Path(tables))
        ground = Ground(images, notebook_epoch(task, notebook_epochs), Path(tables))
        rows: list[Row] = [{"what": f"notebook epoch, {workers} workers", "images": images, "s": ground.epoch}]
        rows.append(row(f"study, reuse {config.train.reuse_gb:g} GB", config, ground))
        if trials_without:
            rows.append(row("study, no reuse", config.replace(trials=trials_without, reuse_gb=0.0), ground))
        if grow:
            first = config.replace(trials=growth_trials or config.trials)
            rows += relative(more_images(first, ground, copies)) + relative(more_trials(first, ground, copies))
    table = pd.DataFrame(rows)
    click.echo(show(table))
    if out:
        table.to_csv(out, index=False)


if __name__ == "__main__":
    main()
