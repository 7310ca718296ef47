"""The benchmark scripts of input, search and checkpoints, run on a few phantoms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# What a machine with a GPU may not have, and the benchmark of the input must do without.
BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys(["mlflow", "optuna"]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, *command: str) -> tuple[str, pd.DataFrame]:
    """(output, table) of a script that runs in an empty folder and leaves no other files there."""
    folder.mkdir()
    out = folder.parent / "table.csv"
    paths = os.pathsep.join([str(EXPERIMENTS), str(EXPERIMENTS.parent)])  # the script's own folder, and this cxr
    one_thread = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}  # as the tests beside it
    done = subprocess.run(
        [sys.executable, *command, "--workers", "0", "--device", "cpu", "--out", str(out)],
        cwd=folder,
        env=os.environ | one_thread,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout, pd.read_csv(out)


@pytest.mark.slow
def test_the_input_benchmark_times_every_way_without_mlflow(phantoms: Path, tmp_path: Path) -> None:
    script = str(EXPERIMENTS / "bench_input.py")
    options = ["--data-dir", str(phantoms), "--image-size", "64", "--batch-size", "8", "--repeats", "2"]
    printed, table = run(tmp_path / "work", "-c", BARE, script, *options, "--images", "24")
    assert printed.startswith("cpu (1 threads), torch ")
    assert "\n24 of " in printed
    assert len(table) == 12
    assert (table.drop(columns="what") > 0).all(axis=None)
    assert table["ratio"][0] == 1
    shapes = {name.split()[-1] for name in table["what"] if name.startswith("cxr, epoch: kept activations")}
    assert shapes == {"512x1x1", "256x4x4"}


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="takes half a minute; .ci/run sets CI")
def test_the_search_benchmark_compares_studies_with_notebook_epochs_and_scales_them(
    phantoms: Path, tmp_path: Path
) -> None:
    script = str(EXPERIMENTS / "bench_search.py")
    sizes = ["--image-size", "64", "--batch-size", "16", "--epochs", "1", "--trials", "2", "--trials-without", "1"]
    growth = ["--growth", "--growth-trials", "1", "--copies", "1,2", "--notebook-epochs", "1"]
    printed, table = run(tmp_path / "work", script, "--data-dir", str(phantoms), *sizes, *growth)
    rows = table.set_index("what")
    assert printed.startswith("device cpu")
    assert list(rows.index[1:3]) == ["study, reuse 8 GB", "study, no reuse"]
    assert list(rows.index[3:]) == ["images x1", "images x2", "trials x1", "trials x2"]
    assert rows["s"].gt(0).all()
    assert (rows.iloc[1:].drop(columns=["relative", "activations MB"]) > 0).all(axis=None)
    assert list(rows["trials"][1:]) == [2, 1, 1, 1, 1, 2]
    assert rows["images"]["images x2"] == 2 * rows["images"]["images x1"]
    assert rows["relative"].gt(0).sum() == 4
    assert list(rows["relative"][["images x1", "trials x1"]]) == [1, 1]
    assert rows["activations MB"]["study, no reuse"] == 0


@pytest.mark.slow
def test_the_checkpoint_benchmark_alternates(tmp_path: Path) -> None:
    script, out = str(EXPERIMENTS / "bench_checkpoint.py"), tmp_path / "table.csv"
    options = ["--arch", "resnet18", "--epoch-seconds", "0.1", "--epochs", "2", "--device", "cpu", "--out", str(out)]
    done = subprocess.run([sys.executable, script, *options], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out).set_index("checkpoint")
    assert table["s held up"].gt(0).all()
    assert table["ratio"]["waited for"] == pytest.approx(1)
