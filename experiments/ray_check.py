"""A comparison, then a cross-validation, on a Ray cluster whose parts die, against the same on this machine alone.

    uv run python experiments/ray_check.py

Result in LOG.md: "2026-11-26: a comparison on a Ray cluster whose parts die".

Two nodes on this machine (`ray.cluster_utils.Cluster`), phantoms, one MLflow store each for Ray and for `--engine
local`. After the first finished run the driver is killed and started again; after the next one, a node is killed, and
another one joins. In the end both stores must hold one parent, each run once and FINISHED, and the same numbers, bit
for bit: losses of every epoch, and predictions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pandas as pd
from mlflow.entities import Run

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # before the import
from ray.cluster_utils import Cluster

from common import AT_LEAST_1
from cxr.data.phantoms import write_synthetic

COMMON = ("--weights", "random", "--image-size", "64", "--bootstrap", "20", "--register", "none", "--threads", "1")


class Driver:
    """`cxr` in a process of its own, with a store in `folder`."""

    def __init__(self, folder: Path, cache: Path, address: str, arguments: Sequence[str]):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        environment = os.environ | {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "CXR_CACHE": str(cache),
            "RAY_ADDRESS": address,
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "cxr", *arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def lines(self) -> Iterator[str]:
        """What it prints, as it prints it."""
        assert self.process.stdout
        for line in self.process.stdout:
            click.echo(f"    {line.rstrip()[:150]}")
            yield line

    def until_finished(self, runs: int) -> None:
        """Read until so many runs have finished."""
        for line in self.lines():
            runs -= ": finished, run" in line
            if runs == 0:
                return
        raise RuntimeError(f"the driver ended early, exit code {self.process.wait()}")


def runs_of(folder: Path, kind: str) -> list[Run]:
    """The runs of a kind in a store."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    chosen = {"filter_string": f"tags.`cxr.kind` = '{kind}'", "search_all_experiments": True}
    found: list[Run] = mlflow.search_runs(output_format="list", **chosen)
    return found


def numbers(folder: Path) -> dict[str, tuple[list[tuple[int, float]], pd.DataFrame]]:
    """Name of each finished run -> its losses by epoch, and its predictions."""
    import mlflow

    found = {}
    for run in runs_of(folder, "member"):
        if run.info.status == "FINISHED":
            history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_loss")
            (file,) = [*Path(run.info.artifact_uri).glob("tables/test_predictions.csv")] or [
                *Path(run.info.artifact_uri).glob("tables/fold_predictions.csv")
            ]
            losses = sorted((entry.step, entry.value) for entry in history)
            found[run.info.run_name] = losses, pd.read_csv(file)
    return found


def survived(work: Path, data: Path, arguments: Sequence[str], kind: str, runs: int) -> bool:
    """Whether the command comes to the same on a cluster whose parts die as on this machine."""
    command = [*arguments, *COMMON, "--data-dir", str(data)]
    started = time.perf_counter()
    local = Driver(work / f"local-{kind}", work / "cache-local", "", [*command, "--jobs", "2"])
    click.echo(f"{kind} by --engine local --jobs 2: exit {[*local.lines()] and local.process.wait()}")
    seconds = time.perf_counter() - started
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    folder = work / f"ray-{kind}"
    begun = time.perf_counter()
    first = Driver(folder, work / "cache-ray", cluster.address, [*command, "--engine", "ray"])
    first.until_finished(1)
    first.process.kill()
    click.echo("the driver was killed")
    second = Driver(folder, work / "cache-ray", cluster.address, [*command, "--engine", "ray"])
    second.until_finished(1)
    cluster.remove_node(node, allow_graceful=False)
    click.echo("a node was killed")
    cluster.add_node(num_cpus=1)
    code = [*second.lines()] and second.process.wait()
    took = time.perf_counter() - begun
    cluster.shutdown()
    parents, here, there = runs_of(folder, kind), numbers(local.folder), numbers(folder)
    finished = [run for run in runs_of(folder, "member") if run.info.status == "FINISHED"]
    same = here.keys() == there.keys() and all(
        here[name][0] == there[name][0] and here[name][1].equals(there[name][1]) for name in here
    )
    states = pd.Series([run.info.status for run in runs_of(folder, "member")]).value_counts().to_dict()
    click.echo(
        f"{kind}: exit {code}, {len(parents)} parent(s) {[run.info.status for run in parents]}, runs {states}; "
        f"same numbers as --engine local: {same}; {took:.0f} s with two deaths, local {seconds:.0f} s"
    )
    return code == 0 and same and len(parents) == 1 and len(finished) == len(here) == runs


@click.command()
@click.option("--seeds", type=AT_LEAST_1, default=3, show_default=True)
@click.option("--epochs", type=AT_LEAST_1, default=2, show_default=True)
def main(seeds: int, epochs: int) -> None:
    """Run both; exit code 1 if one did not come to the same."""
    work = Path(tempfile.mkdtemp())
    data = write_synthetic(work / "phantoms", seed=1, train_patients=24, test_patients=10, size=64)
    more = ["--epochs", str(epochs)]
    good = survived(work, data, ["compare", "--seeds", str(seeds), *more], "comparison", 4 * seeds)
    good &= survived(work, data, ["crossval", "--folds", "5", "--strategy", "partial", *more], "crossval", 5)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
