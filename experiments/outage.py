"""Take the MLflow server away from runs, and compare what they leave with a run that was not disturbed.

    uv run python experiments/outage.py --seconds 60

Three runs of the same command, logged to a server with SQLite: one that is left alone; one whose server is killed (-9)
for so many seconds in the middle of an epoch and again after the last epoch, while the result is logged; one whose
server is killed in the middle of an epoch and stays away for the rest of the run, which is then resumed. Prints what
each run printed about the outage, and whether metrics (step by step), parameters, tags, data sets and the bytes of the
artifacts equal those of the first. Exit code 1 if they do not. Result in docs/reliability.md.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import click
import requests

from cxr.data.phantoms import write_synthetic

TIMES = ("seconds", "per_second", "system/", "peak_memory", "total_seconds", "test_uses_before")
OWN = ("registered", "cxr.process")  # tags that no two runs share
WORDS = ("MLflow", "error")  # of lines about the store
EPOCHS = 100  # which take longer than the server is away


class Server:
    """An MLflow server, on SQLite if no other database is given, that can be killed and started again."""

    def __init__(self, folder: Path, database: str = ""):
        self.database = database or f"sqlite:///{folder}/mlflow.db"
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        store = ["--backend-store-uri", self.database]
        store += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(self.port)]
        log = (self.folder / "server.txt").open("a")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 180
        while time.monotonic() < until:
            try:
                if requests.get(f"{self.uri}/health", timeout=2).ok:
                    return
            except requests.RequestException:
                time.sleep(0.5)
        raise TimeoutError((self.folder / "server.txt").read_text()[-2000:])

    def kill(self) -> None:
        """Kill it with its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def away(self, seconds: float) -> None:
        """Kill it, and start it again after so many seconds."""
        self.kill()
        time.sleep(seconds)
        self.start()


def started(work: Path, server: Server, *options: str) -> subprocess.Popen[str]:
    """Start `cxr train` on the phantoms of the folder."""
    settings = [
        "--data-dir",
        str(work / "chest_xray"),
        "--weights",
        "random",
        "--image-size",
        "64",
        "--strategy",
        "partial",
    ]
    settings += ["--epochs", str(EPOCHS), "--patience", str(EPOCHS), "--bootstrap", "50", "--threads", "1"]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": server.uri,
        "CXR_CACHE": str(work / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "cxr", "train", *([] if "--resume" in options else settings), *options]
    return subprocess.Popen(
        command, cwd=work, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def read_until(stream: IO[str], beginning: str, said: list[str]) -> None:
    """Read lines up to one that begins so."""
    for line in stream:
        said.append(line.rstrip())
        if line.startswith(beginning):
            return
    raise EOFError("\n".join(said))


def finished(process: subprocess.Popen[str], said: list[str]) -> int:
    """Read the rest, show what was said about the store, and return the exit code."""
    assert process.stdout is not None
    said += [line.rstrip() for line in process.stdout]
    for line in said:
        if any(word in line for word in WORDS) and "mlflow ui" not in line and "http" not in line[:8]:
            click.echo(f"    {line[:230]}")
    return process.wait()


def left_alone(work: Path, server: Server) -> int:
    """Nothing happens."""
    return finished(started(work, server), [])


def twice_away(work: Path, server: Server, seconds: float) -> int:
    """The server is away in mid-epoch, and again while the result is logged."""
    process, said = started(work, server), list[str]()
    assert process.stdout is not None
    read_until(process.stdout, "epoch  0", said)
    server.away(seconds)
    read_until(process.stdout, f"epoch {EPOCHS - 1:2}", said)
    server.away(seconds)
    return finished(process, said)


def gone(work: Path, server: Server) -> int:
    """The server is away for the rest of the run, whose patience is short, and which is resumed later."""
    process, said = started(work, server, "--tracking-patience", "0.2"), list[str]()
    assert process.stdout is not None
    read_until(process.stdout, "epoch  0", said)
    server.kill()
    code = finished(process, said)
    server.start()
    click.echo(f"    exit code {code}; the server answers again")
    run_id = next(line for line in said if line.startswith("error")).rpartition(" ")[2]
    return finished(started(work, server, "--resume", run_id), [])


def newest(server: Server) -> dict[str, Any]:
    """What the store holds of the newest run, without times and IDs."""
    import mlflow

    mlflow.set_tracking_uri(server.uri)
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    run, client = found[0], mlflow.MlflowClient()
    # The patience of the last run is another; the page names the run; these tables hold seconds, and what they hold
    # else is in the metrics that are compared, or computed from the predictions.
    free = ("train.tracking_patience", "config.json", "REPORT.html", "tables/history.csv", "tables/metrics.csv")
    names = [name for name in run.data.metrics if not any(word in name for word in TIMES)]
    histories = {n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in sorted(names)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=folder))
        files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    about = {name: v for name, v in run.data.tags.items() if not name.startswith("mlflow.") and name not in OWN}
    return {
        "status": run.info.status,
        "metrics": histories,
        "params": {name: value for name, value in run.data.params.items() if name not in free},
        "tags": about,
        "data sets": sorted(each.dataset.name for each in run.inputs.dataset_inputs),
        "artifacts": {name: content if name not in free else b"" for name, content in files.items()},
        "models": len(run.outputs.model_outputs),
        "runs": len(found),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    found = []
    for key in one:
        if key == "runs" or one[key] == other[key]:
            continue
        names = set(one[key]) ^ set(other[key]) if isinstance(one[key], dict) else {f"{one[key]} / {other[key]}"}
        if isinstance(one[key], dict):
            names |= {name for name in one[key].keys() & other[key].keys() if one[key][name] != other[key][name]}
        found.append(f"{key}: {', '.join(sorted(names))}")
    return found


@click.command()
@click.option("--seconds", type=float, default=60, show_default=True, help="how long the server is away")
def main(seconds: float) -> None:
    """Run all three and compare."""
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        write_synthetic(work)
        server = Server(work)
        try:
            failed = _compared(work, server, seconds)
        finally:
            server.kill()
    sys.exit(1 if failed else 0)


def _compared(work: Path, server: Server, seconds: float) -> bool:
    failed, expected = False, None
    cases = {
        "left alone": lambda: left_alone(work, server),
        f"away for {seconds:g} s in mid-epoch and again during final logging": lambda: twice_away(
            work, server, seconds
        ),
        "away for the rest of the run, then resumed": lambda: gone(work, server),
    }
    for number, (name, case) in enumerate(cases.items(), 1):
        click.echo(f"{name}:")
        began = time.monotonic()
        code, found = case(), newest(server)
        expected = expected or found
        wrong = differences(expected, found) + (
            [f"{found['runs']} runs, not {number}"] if found["runs"] != number else []
        )
        steps, files = sum(len(each) for each in found["metrics"].values()), len(found["artifacts"])
        click.echo(
            f"  exit code {code}, {found['status']}, {steps} points of {len(found['metrics'])} metrics, "
            f"{files} artifacts, {time.monotonic() - began:.0f} s"
        )
        click.echo(f"  {'equal' if not wrong else '; '.join(wrong)}")
        failed |= code != 0 or bool(wrong)
    return failed


if __name__ == "__main__":
    main()
