"""How much sooner a comparison ends when its runs are at work side by side.

    uv run python experiments/bench_jobs.py --data-dir FOLDER --epochs 4

Results in LOG.md: "2026-11-26: runs side by side on two cores", and again.

The same comparison, `--strategies` with `--seeds`, one after the other with all cores for each run, then with `--jobs`,
then on Ray on this machine: each as a command of its own, start-up and decoding included, with an empty cache and an
empty MLflow store. The ratio is the seconds of the first over those of the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import pandas as pd

from common import AT_LEAST_1, report


def seconds(work: Path, arguments: list[str]) -> float:
    """The seconds that a command takes, in an empty folder."""
    work.mkdir()
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db", "CXR_CACHE": f"{work}/cache"}
    started = time.perf_counter()
    with (work / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "cxr", "compare", *arguments]
        subprocess.run(command, cwd=work, env=environment, stdout=output, stderr=output, check=True)
    return time.perf_counter() - started


@click.command()
@click.option("--data-dir", required=True, help="Kaggle-shaped folder")
@click.option("--strategies", default="all", show_default=True)
@click.option("--seeds", type=AT_LEAST_1, default=2, show_default=True)
@click.option("--epochs", type=AT_LEAST_1, default=4, show_default=True)
@click.option("--image-size", type=AT_LEAST_1, default=224, show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--weights", default="random", show_default=True)
@click.option("--jobs", type=AT_LEAST_1, default=os.cpu_count(), show_default=True)
@click.option("--ways", default="all,one,jobs,ray", show_default=True, help="some of them")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="also write the table there as CSV")
def main(data_dir: str, jobs: int, ways: str, out: Path | None, **options: object) -> None:
    """Run all ways and print the table."""
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    known = {
        "all": ("one after the other, all cores each", ["--jobs", "1", "--threads", str(os.cpu_count())]),
        "one": ("one after the other, one thread each", ["--jobs", "1", "--threads", "1"]),
        "jobs": (f"{jobs} side by side, one thread each", ["--jobs", str(jobs), "--threads", "1"]),
        "ray": ("Ray, one thread each", ["--engine", "ray", "--threads", "1"]),
    }
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as work:
        for number, (way, own) in enumerate(known[name] for name in ways.split(",")):
            took = seconds(Path(work) / str(number), ["--data-dir", data_dir, "--register", "none", *given, *own])
            rows.append({"way": way, "s": took, "ratio": float(str(rows[0]["s"])) / took if rows else 1.0})
            click.echo(rows[-1], err=True)
    report(pd.DataFrame(rows), out, {"s": 1, "ratio": 2})


if __name__ == "__main__":
    main()
