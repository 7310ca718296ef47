"""Stop PostgreSQL under an MLflow server and a study, and compare what is left with what undisturbed ones left.

    uv run python experiments/outage_postgres.py --seconds 60

The MLflow server and the study keep all in one PostgreSQL. A run, a study with two workers, and a comparison of two
strategies are made twice: undisturbed, and with PostgreSQL stopped for so many seconds once the first epoch is logged.
The second worker of the study is "another machine": another cache folder, another host name (by `unshare`, as root)
and another process group. Prints for each what is equal; exit code 1 if anything is not. Result in
docs/reliability.md. Needs PostgreSQL's binaries (`apt-get install postgresql`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import psycopg

from cxr.data.phantoms import write_synthetic
from outage import TIMES, Server

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "support")]

from postgres import Postgres, programs  # noqa: E402

TRAIN = ("--weights", "random", "--image-size", "64", "--bootstrap", "0", "--threads", "1", "--epochs", "6")
ANOTHER = ("unshare", "--uts", "sh", "-c", 'hostname another; exec "$@"', "sh")


class Place:
    """A machine: its folder and cache."""

    def __init__(self, work: Path, name: str, server: Server):
        self.folder, self.cache = work / name, work / f"{name}-cache"
        self.folder.mkdir()
        self.environment = os.environ | {
            "MLFLOW_TRACKING_URI": server.uri,
            "CXR_CACHE": str(self.cache),
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, command: Sequence[str], *before: str) -> subprocess.Popen[str]:
        """Start `cxr` there; `before` comes before the interpreter."""
        with (self.folder / "output.txt").open("w") as output:
            whole = [*before, sys.executable, "-m", "cxr", *command]
            return subprocess.Popen(
                whole,
                cwd=self.folder,
                env=self.environment,
                text=True,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def said(self) -> list[str]:
        """The lines printed so far."""
        return (self.folder / "output.txt").read_text().splitlines()


def wait_for(place: Place, word: str, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until a line holds the word."""
    while not any(word in line for line in place.said()):
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("\n".join(place.said()[-5:]))
        time.sleep(0.2)


def results(experiment: str, server: Server) -> dict[str, dict[str, Any]]:
    """Name of each finished run -> its metrics, step by step, without times."""
    import mlflow

    mlflow.set_tracking_uri(server.uri)
    client, found = mlflow.MlflowClient(), {}
    for run in mlflow.search_runs(experiment_names=[experiment], output_format="list"):
        names = [name for name in run.data.metrics if not any(word in name for word in TIMES)]
        history = {n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in sorted(names)}
        name = run.info.run_name
        found[name if name not in found else f"{name} again"] = {"status": run.info.status, **history}
    return found


def case(name: str, work: Path, server: Server, postgres: Postgres, seconds: float) -> dict[str, dict[str, Any]]:
    """Run one command (two workers of a study), with an outage of so many seconds if any; returns its results."""
    data = ("--data-dir", str(work / "chest_xray"), *TRAIN)
    experiment = f"{name}-{seconds:g}"
    places = [Place(work, experiment, server)]
    study = ("--study", experiment, "--storage", f"{postgres.url}/optuna", "--trials", "12", "--heartbeat", "5")
    command, word = {
        "train": (("train", "--strategy", "partial", *data), "epoch  0"),
        "tune": (
            ("tune", "--strategy", "frozen", *study, "--sampler", "RandomSampler", "--pruner", "NopPruner", *data),
            "study",
        ),
        "compare": (("compare", "--strategies", "frozen,partial", "--seeds", "1", "--jobs", "2", *data), "epoch  0"),
    }[name]
    command = (*command, "--register", "none")
    for place in places:
        place.environment["MLFLOW_EXPERIMENT_NAME"] = experiment
    processes = [places[0].start(command)]
    if name == "tune":
        wait_for(places[0], word, processes)
        places.append(Place(work, f"{experiment}-second", server))
        places[1].environment["MLFLOW_EXPERIMENT_NAME"] = experiment
        processes.append(places[1].start(command, *(ANOTHER if os.geteuid() == 0 else ())))
        wait_for(places[1], "trial ", processes[1:])
    if seconds:
        wait_for(places[0], word, processes)
        postgres.stop()
        time.sleep(seconds)
        postgres.start()
    codes = [process.wait() for process in processes]
    for place in places:
        lines = [line for line in place.said() if "answer" in line or line.startswith("error")]
        click.echo("".join(f"    {line[:200]}\n" for line in lines), nl=False)
    click.echo(f"  {experiment}: exit codes {codes}")
    return results(experiment, server)


def compared(name: str, expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> bool:
    """Say what differs. Workers of a study take its trials in any order: it must be complete, each trial finished once,
    and nothing be left running."""
    open_runs = [run for run, content in found.items() if content["status"] != "FINISHED"]
    if name == "tune":
        finished = [
            run for run, content in found.items() if content["status"] == "FINISHED" and run.startswith("trial")
        ]
        good = len(finished) == 12 and not any(found[run]["status"] == "RUNNING" for run in found)
        click.echo(f"  {name}: trials finished: {', '.join(sorted(finished))}; not finished: {open_runs or 'none'}")
        return good
    points = sum(len(each) for content in found.values() for key, each in content.items() if key != "status")
    click.echo(f"  {name}: {len(found)} runs, {points} points, {'equal' if found == expected else 'DIFFERENT'}")
    return found == expected and not open_runs


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True, help="how long it is stopped")
@click.option("--only", type=click.Choice(["train", "tune", "compare"]), multiple=True, help="only these commands")
def main(seconds: float, only: tuple[str, ...]) -> None:
    """Run all cases."""
    if (found := programs()) is None:
        raise click.UsageError("PostgreSQL is not installed: apt-get install postgresql")
    good = True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        write_synthetic(work)
        postgres = Postgres(found)
        for name in ("mlflow", "optuna"):
            with psycopg.connect(f"{postgres.url}/postgres", autocommit=True) as connection:
                connection.execute(f"create database {name}")
        server = Server(work, f"{postgres.url}/mlflow".replace("://", "+psycopg://", 1))
        try:
            for name in only or ("train", "tune", "compare"):
                click.echo(f"{name}:")
                undisturbed = case(name, work, server, postgres, 0)
                good &= compared(name, undisturbed, case(name, work, server, postgres, seconds))
        finally:
            server.kill()
            postgres.remove()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
