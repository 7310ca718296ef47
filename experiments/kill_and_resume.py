"""Kill a run with SIGKILL at random moments, resume it, and compare it with a run that was not disturbed.

    uv run python experiments/kill_and_resume.py --kills 20

Result in LOG.md: "2026-11-22: kill -9 and resume, 20 kills during the run", "2026-11-21: kill -9 and resume, 20 times",
and under "2026-11-22: checkpoints written while the next epoch trains".

Prints a table: when each attempt was killed, the last line that it had printed, how many epochs it had logged, and
whether history and test probabilities of the resumed run equal the undisturbed run's, bit for bit, with no step logged
twice. A kill that comes after the end of a run does not count and is repeated with another delay.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import pandas as pd
from mlflow.entities import Run

from cxr.config import TrainConfig
from cxr.data.phantoms import write_synthetic

EPOCHS = "3"


def configs(data_dir: str, weights: str) -> list[TrainConfig]:
    """The run that is killed."""
    return [TrainConfig(strategy="gradual", data_dir=data_dir, weights=weights, image_size=64, epochs=int(EPOCHS))]


def new_store(work: Path) -> Path:
    """A folder with an empty SQLite store."""
    import mlflow

    (work / "store").mkdir()
    mlflow.set_tracking_uri(f"sqlite:///{work}/store/mlflow.db")
    mlflow.search_experiments()
    return work / "store"


def train(folder: Path, cache: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start `cxr train` with a store in `folder`."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "CXR_CACHE": str(cache)}
    environment |= {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "cxr", "train", *options]
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.DEVNULL)


def last_line(folder: Path) -> str:
    """The beginning of the last line that the killed process printed."""
    lines = (folder / "output.txt").read_text().splitlines()
    return " ".join(lines[-1].split()[:3]) if lines else "(nothing yet)"


def outcome(folder: Path) -> dict[str, object]:
    """What the store holds about its newest run."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    run = found[0]
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_loss")
    finals = mlflow.MlflowClient().get_metric_history(run.info.run_id, "test_brier")
    return {
        "id": run.info.run_id,
        "status": run.info.status,
        "history": [(entry.step, entry.value) for entry in history],
        "test": [entry.value for entry in finals],
        "runs": len(found),
        "probabilities": probabilities(run) if finals else [],
        "versions": len(mlflow.search_model_versions()),
    }


def probabilities(run: Run) -> list[float]:
    """The test probabilities that the run logged."""
    file = Path(run.info.artifact_uri) / "tables" / "test_predictions.csv"
    return list(pd.read_csv(file)["probability"])


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    """Run the experiment and print its table."""
    work = Path(tempfile.mkdtemp())
    data = write_synthetic(work / "phantoms", seed=1, train_patients=24, test_patients=10, size=64)
    options = ["--strategy", "gradual", "--data-dir", str(data), "--weights", "random", "--image-size", "64"]
    options += ["--epochs", EPOCHS, "--bootstrap", "50"]
    # Not part of the test: a kill while MLflow creates a SQLite store leaves one that it cannot open again.
    store = new_store(work)
    shutil.copytree(store, work / "whole")
    started = time.perf_counter()
    assert train(work / "whole", work / "cache-whole", *options).wait() == 0
    seconds = time.perf_counter() - started
    whole, moments = outcome(work / "whole"), random.Random(seed)
    rows: list[dict[str, object]] = []
    for attempt in itertools.count():
        if len(rows) == kills:
            break
        folder, cache = work / f"run-{attempt}", work / f"cache-{attempt}"
        shutil.copytree(store, folder)
        process, after = train(folder, cache, *options), moments.uniform(0.15, 1) * seconds
        time.sleep(after)
        process.kill()
        if process.wait() == 0:
            continue
        row = {"kill": len(rows), "after_s": round(after, 1), "last line": last_line(folder)}
        row |= resumed(folder, cache, options, whole)
        if row["status"] == "FINISHED":
            continue
        rows.append(row)
        click.echo(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1))
    good = sum(bool(row["same"]) for row in rows)
    click.echo(f"{good} of {kills} ended like the undisturbed run ({seconds:.0f} s)")
    sys.exit(0 if good == kills else 1)


def resumed(folder: Path, cache: Path, options: list[str], whole: dict[str, object]) -> dict[str, object]:
    """Resume the killed run and compare it with the undisturbed one, `whole`."""
    try:
        before = outcome(folder)
    except IndexError:  # killed before the run was opened: there is nothing to resume
        before = {"id": None, "status": "no run", "history": []}
    if before["status"] == "FINISHED":
        code = 0
    else:
        resume = ["--resume", str(before["id"])] if before["id"] else options
        code = train(folder, cache, *resume).wait()
    after = outcome(folder)
    same = code == 0 and all(
        after[key] == whole[key] for key in ("status", "history", "test", "runs", "probabilities", "versions")
    )
    same = same and before["id"] in (None, after["id"])
    history = before["history"]
    assert isinstance(history, list)
    return {"status": before["status"], "epochs_logged": len(history), "exit": code, "same": same}


if __name__ == "__main__":
    main()
