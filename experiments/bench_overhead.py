"""What a run costs beyond training: its command alone, and as one of a comparison.

    uv run python experiments/bench_overhead.py --data-dir KAGGLE --strategies frozen,partial --epochs 8

Results in LOG.md: "2026-11-26: what surrounds training, again" and "…, for the third time".

Of each strategy the command `cxr train` runs `--repeats` times on one cache, after a first time that fills it (decoded
images, audit, activations); then `cxr compare`, once to fill the cache, and once for each of `--jobs`: how many go side
by side, with `--repeats` seeds and one more for each of them. Beyond training is the wall time of the command, or, in a
comparison, the time from the end of the first runs to that of the last, for each run that ended in it, less the seconds
of the run's epochs and of their validation (of which as many pass at once as runs go side by side).
`--profile FILE` writes a profile of one more `cxr train` of the last strategy, for `python -m pstats FILE`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import mlflow
import pandas as pd

from common import AT_LEAST_1, report
from cxr.tracking.reading import Artifact, LoggedRun


def run_cxr(work: Path, *arguments: str, profile: Path | None = None) -> float:
    """The seconds that a command of cxr takes."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db", "CXR_CACHE": f"{work}/cache"}
    profiled = ["-m", "cProfile", "-o", str(profile.absolute())] if profile else []
    started = time.perf_counter()
    with (work / "output.txt").open("a") as output:
        command = [sys.executable, *profiled, "-m", "cxr", *arguments]
        subprocess.run(command, cwd=work, env=environment, stdout=output, stderr=output, check=True)
    return time.perf_counter() - started


def newest_runs(count: int) -> list[mlflow.entities.Run]:
    """The training runs that were started last, the oldest of them first."""
    found = mlflow.search_runs(
        search_all_experiments=True, output_format="list", order_by=["attributes.start_time DESC"]
    )
    return [run for run in found if "total_seconds" in run.data.metrics][:count][::-1]


def training_seconds(run_id: str) -> float:
    """Of all epochs of a run, validation included."""
    history = LoggedRun.open(run_id).table(Artifact.HISTORY)
    return float((history["epoch_seconds"] + history["eval_seconds"]).sum())


def row(way: str, strategy: str, seconds: float, training: float) -> dict[str, object]:
    """A line of the table."""
    return {"way": way, "strategy": strategy, "s": seconds, "training s": training, "beyond s": seconds - training}


def measured(
    work: Path, strategy: str, repeats: int, side_by_side: list[int], options: list[str]
) -> Iterator[dict[str, object]]:
    """The lines of one strategy."""
    for number in range(repeats + 1):
        seconds = run_cxr(work, "train", "--strategy", strategy, *options)
        way = f"train, {number}" if number else "train, first"
        yield row(way, strategy, seconds, training_seconds(newest_runs(1)[0].info.run_id))
    seeds = max(side_by_side, default=0) * (repeats + 1)
    comparison = ("compare", "--strategies", strategy, "--seeds", str(seeds), *options)
    if seeds:
        run_cxr(work, *comparison, "--jobs", "1")
    for jobs in side_by_side:
        run_cxr(work, *comparison, "--jobs", str(jobs))
        yield of_a_comparison(strategy, newest_runs(seeds), jobs)


def of_a_comparison(strategy: str, runs: list[mlflow.entities.Run], jobs: int) -> dict[str, object]:
    """The line of a comparison, for each of its runs."""
    ends = sorted(run.info.end_time / 1000 for run in runs)
    seconds = (ends[-1] - ends[jobs - 1]) / (len(runs) - jobs)
    training = sum(training_seconds(run.info.run_id) for run in runs) / len(runs) / jobs
    return row(f"of a comparison, {jobs} at once", strategy, seconds, training)


@click.command()
@click.option("--data-dir", required=True, help="Kaggle-shaped folder")
@click.option("--strategies", default="frozen,partial", show_default=True)
@click.option("--repeats", type=AT_LEAST_1, default=3, show_default=True)
@click.option("--jobs", default="1,2", show_default=True, help="none: no comparison")
@click.option("--epochs", type=AT_LEAST_1, default=8, show_default=True)
@click.option("--views", type=AT_LEAST_1, default=6, show_default=True, help="fewer are sooner there for new seeds")
@click.option("--weights", default="random", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--figures", default="all", show_default=True)
@click.option("--image-size", type=AT_LEAST_1, default=224, show_default=True)
@click.option("--profile", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
def main(
    strategies: str, repeats: int, jobs: str, profile: Path | None, out: Path | None, data_dir: str, **options: object
) -> None:
    """Measure every strategy and print the table."""
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    given += ["--data-dir", str(Path(data_dir).absolute())]
    side_by_side = [] if jobs == "none" else [int(number) for number in jobs.split(",")]
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as work:
        mlflow.set_tracking_uri(f"sqlite:///{work}/mlflow.db")
        for strategy in strategies.split(","):
            for line in measured(Path(work), strategy, repeats, side_by_side, given):
                rows.append(line)
                click.echo(line, err=True)
        if profile:
            run_cxr(Path(work), "train", "--strategy", strategy, *given, profile=profile)
    report(pd.DataFrame(rows), out, {"s": 1, "training s": 1, "beyond s": 1})


if __name__ == "__main__":
    main()
