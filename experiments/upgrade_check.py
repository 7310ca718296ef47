"""Check that this tree reads, resumes and reuses what an earlier version of the code made.

    uv run python experiments/upgrade_check.py --old COMMIT

Result in LOG.md: "2026-11-25: what version 0.1 made, under the new layout".

Under the old commit, on phantoms: a finished run of each strategy, an interrupted one, an interrupted search, a
registered model and a filled cache, and the same undisturbed. Then the same commands under this tree, in the same
store and cache. Prints one line per check and exits with 1 if any fails.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

ROOT = Path(__file__).parent.parent
SIZE = ["--image-size", "64", "--epochs", "2", "--views", "2", "--bootstrap", "100", "--weights", "random"]
STRATEGIES = ("frozen", "partial", "full", "gradual")
TUNE = ["tune", "--strategy", "partial", "--trials", "5", "--refit", "false", "--pruner", "NopPruner", *SIZE]
# What younger parameters must be for the results of version 0.1.
AS_BEFORE = [
    "--augment",
    "mild-1",
    "--average",
    "none",
    "--stresses",
    "stresses-1",
    "--reuse-gb",
    "4",
    "--lr-top",
    "5e-4",
]
LONG = ["train", "--strategy", "gradual", "--seed", "1", *SIZE]
# What differs between two runs of the same code: clocks, memory, and how often a test split was looked at.
CLOCKS = ("seconds", "per_second", "memory", "test_uses", "system/")


class Version:
    """One version of the code, its commands run in a folder that holds the store and the cache."""

    def __init__(self, code: Path, folder: Path):
        self.code, self.folder = code, folder
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `cxr` with these arguments."""
        environment = os.environ | {"PYTHONPATH": str(self.code), "CXR_CACHE": str(self.folder / "cache")}
        environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "cxr", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=self.folder, env=environment, text=True, **streams)

    def run(self, *arguments: str) -> str:
        """Run `cxr` and return what it printed. Raises `RuntimeError` when it fails."""
        process = self.start(*arguments)
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"cxr {' '.join(arguments)} ended with {process.returncode}:\n{output}")
        return output

    def killed(self, mark: str, *arguments: str) -> None:
        """Run `cxr` and kill it when it prints a line that holds `mark`."""
        process = self.start(*arguments)
        assert process.stdout
        if not any(mark in line for line in process.stdout):
            raise RuntimeError(f"cxr {' '.join(arguments)} ended without printing {mark!r}")
        process.kill()
        process.communicate()

    def client(self) -> Any:
        """MLflow's client of the store."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")

    def runs(self) -> dict[str, Any]:
        """Run id -> MLflow's run, of all in the store."""
        client = self.client()
        experiments = [each.experiment_id for each in client.search_experiments()]
        return {run.info.run_id: run for run in client.search_runs(experiments)}

    def new_run(self, *arguments: str) -> Any:
        """Run `cxr` and return the run that it added to the store."""
        before = self.runs().keys()
        self.run(*arguments)
        runs = self.runs()
        (added,) = runs.keys() - before
        return runs[added]


def tabled(root: Path) -> dict[str, float]:
    """The metrics that later versions keep only in a table, under the names that they had as metrics."""
    file = root / "tables/metrics.csv"
    if not file.exists():
        return {}
    table = pd.read_csv(file, index_col="metric", dtype=str)  # text keeps every digit
    ends = {"value": "", "low": "_low", "high": "_high"}
    found = {f"{name}{end}": float(table.loc[name, column]) for name in table.index for column, end in ends.items()}
    known = {name: value for name, value in found.items() if not np.isnan(value)}
    return {name: value for name, value in known.items() if not any(clock in name for clock in CLOCKS)}


def result(version: Version, run: Any) -> dict[str, Any]:
    """The whole history of every metric that is not a clock, and the predictions of validation and test."""
    client = version.client()
    names = [name for name in run.data.metrics if not any(clock in name for clock in CLOCKS)]
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    numbers = {name: [(each.step, each.value) for each in history] for name, history in histories.items()}
    root = Path(str(run.info.artifact_uri).removeprefix("file://"))
    numbers = {name: [(numbers["test_roc_auc"][-1][0], value)] for name, value in tabled(root).items()} | numbers
    tables = {split: pd.read_csv(root / f"tables/{split}_predictions.csv") for split in ("val", "test")}
    columns = {f"{split}: {name}": list(column) for split, table in tables.items() for name, column in table.items()}
    return {**numbers, **columns}


def holds(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a result has every metric and column of an older one, with the same values; it may have more."""
    return len(old) > 20 and all(new.get(name) == values for name, values in old.items())


def new_result(version: Version, *arguments: str) -> dict[str, Any]:
    """Run `cxr` and return the result of the run that it added."""
    return result(version, version.new_run(*arguments))


def trials(version: Version) -> list[tuple[str, str]]:
    """(learning rate, objective) of each finished trial in the store."""
    found = [run for run in version.runs().values() if run.data.tags.get("cxr.kind") == "trial"]
    done = [run for run in found if run.info.status == "FINISHED"]
    return sorted((run.data.params["train.lr_top"], str(run.data.metrics["val_loss"])) for run in done)


def kept_files(folder: Path) -> dict[str, tuple[int, str]]:
    """File -> (inode, sha256) of decoded images and activations."""
    paths = [path for kind in ("store", "activations") for path in (folder / "cache" / kind).rglob("*")]
    files = [path for path in paths if path.is_file()]
    return {str(path): (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def unchanged(kept: dict[str, tuple[int, str]], now: dict[str, tuple[int, str]]) -> bool:
    """Whether all files are as they were, and nothing is new but the outputs that the final evaluation starts from.

    Those are kept of `frozen` and of `partial`; the old code ran the whole network.
    """
    added = {Path(path).parent for path in now.keys() - kept.keys()}
    only_outputs = {folder.parent.name for folder in added} <= {"activations"}
    return kept.items() <= now.items() and only_outputs and len(added) <= 2


def make(old: Version, undisturbed: Version) -> dict[str, Any]:
    """All that the old code leaves, and the undisturbed versions of what was interrupted."""
    made: dict[str, Any] = {
        strategy: new_result(old, "train", "--strategy", strategy, *SIZE) for strategy in STRATEGIES
    }
    before = old.runs().keys()
    made["finished"] = next(iter(before))
    old.killed("epoch  3", *LONG)
    (interrupted,) = old.runs().keys() - before
    old.killed("trial   2", *TUNE)
    film = next((old.folder / "cache").glob("synthetic-*/chest_xray/test/PNEUMONIA/*"))
    whole = new_result(undisturbed, *LONG)
    return {**made, "interrupted": interrupted, "whole": whole, "trials": trials(old), "film": str(film)}


def checks(new: Version, made: dict[str, Any]) -> dict[str, Callable[[], bool]]:
    """What must hold -> the check, in the order in which they must run."""
    kept, predicted = kept_files(new.folder), made["predicted"]

    def resumed() -> bool:
        new.run("train", "--resume", made["interrupted"])
        return holds(result(new, new.runs()[made["interrupted"]]), made["whole"])

    def studied() -> bool:
        new.run(*TUNE, *AS_BEFORE)
        found, running = trials(new), [run for run in new.runs().values() if run.info.status == "RUNNING"]
        return len(made["trials"]) >= 3 and len(found) == 5 and set(made["trials"]) <= set(found) and not running

    found: dict[str, Callable[[], bool]] = {}
    for strategy in STRATEGIES:
        found[f"{strategy}: the same command gives the same numbers"] = lambda strategy=strategy: holds(
            new_result(new, "train", "--strategy", strategy, "--register", "none", *SIZE, *AS_BEFORE), made[strategy]
        )
    found["the cache is used, nothing in it rebuilt"] = lambda: unchanged(kept, kept_files(new.folder))
    found["the registered model loads and answers the same"] = lambda: new.run("predict", made["film"]) == predicted
    found["the logged model verifies"] = lambda: bool(new.run("models", "verify", made["finished"]))
    found["the interrupted run is resumed to the undisturbed result"] = resumed
    found["the interrupted search continues to its number of trials and keeps those it had"] = studied
    return found


@click.command()
@click.option("--old", required=True, help="commit of the earlier version")
@click.option("--folder", type=Path, help="where to work; a temporary folder if not given")
def main(old: str, folder: Path | None) -> None:
    """Make with the old code, then use with this tree's."""
    folder = folder or Path(tempfile.mkdtemp(prefix="cxr-upgrade-"))
    code, started, failed = folder / "old", time.perf_counter(), 0
    subprocess.run(["git", "worktree", "add", "--detach", "--force", str(code), old], cwd=ROOT, check=True)
    try:
        before = Version(code, folder / "work")
        made = make(before, Version(code, folder / "undisturbed"))
        made["predicted"] = before.run("predict", made["film"])
        for what, check in checks(Version(ROOT, folder / "work"), made).items():
            try:
                held = check()
            except RuntimeError as error:
                held = False
                click.echo(error, err=True)
            failed += not held
            click.echo(f"{'ok  ' if held else 'FAIL'} {what}  ({time.perf_counter() - started:.0f} s)")
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(code)], cwd=ROOT, check=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
