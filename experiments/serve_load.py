"""Serve a registered model on localhost and send it requests, a tenth of them invalid.

    MLFLOW_TRACKING_URI=sqlite:////…/mlflow.db uv run python experiments/serve_load.py --requests 1000 --clients 8

Result in LOG.md: "2026-11-21: serving under load" and "2026-11-22: serving under sustained load".

Prints how many valid requests were answered with the right probability and how many invalid ones with status 400, the
rate, and the server's memory before and after each 500 requests.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import psutil
from PIL import Image

from cxr.data.phantoms import phantom
from cxr.tracking.registry import load

PORT = 5077
URL = f"http://127.0.0.1:{PORT}"


def png(size: int) -> bytes:
    """A phantom as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(phantom(np.random.default_rng(size), "virus", size)).save(buffer, "PNG")
    return buffer.getvalue()


def huge_header() -> bytes:
    """A PNG whose header claims 400 million pixels."""
    data = bytearray(png(64))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    return bytes(data)


def invalid() -> list[object]:
    """Inputs that must be answered with status 400."""
    text = [Path("/etc/passwd").as_posix(), "file:///etc/passwd", "http://127.0.0.1/film.png", "", "%%%"]
    encoded = [base64.b64encode(data).decode() for data in (b"no image", png(64)[:200], huge_header())]
    return [*text, *encoded, 7, None]


def post(image: object) -> tuple[int, str]:
    """(status, body) of one request."""
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}}).encode()
    request = urllib.request.Request(f"{URL}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def memory(pid: int) -> float:
    """The resident memory of a process and its descendants in MB."""
    parent = psutil.Process(pid)
    return sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)]) / 1e6


def serve(uri: str) -> subprocess.Popen[bytes]:
    """Start the server and wait until it answers."""
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow calls `uvicorn` by name
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [*command, "-p", str(PORT)], env=os.environ | {"PATH": path}, start_new_session=True, stdout=quiet, stderr=quiet
    )
    for _ in range(120):
        time.sleep(1)
        try:
            urllib.request.urlopen(f"{URL}/ping", timeout=2)
            return process
        except OSError:
            continue
    raise TimeoutError("the server did not answer within 2 minutes")


@click.command()
@click.option("--model", default="models:/cxr-pneumonia@champion", show_default=True)
@click.option("--requests", default=1000, show_default=True)
@click.option("--clients", default=8, show_default=True)
def main(model: str, requests: int, clients: int) -> None:
    """Send the requests and print the results."""
    predictor, data = load(model), png(224)
    right = float(predictor.predict([predictor.prepare(data)])["probability"][0])
    bad = itertools.cycle(invalid())
    good = base64.b64encode(data).decode()
    jobs: list[object] = [next(bad) if number % 10 == 9 else good for number in range(requests)]
    process = serve(model)
    try:
        list(map(post, jobs[:20]))
        sizes, answers, started = [memory(process.pid)], [], time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            for first in range(0, requests, 500):
                answers += list(pool.map(post, jobs[first : first + 500]))
                sizes.append(memory(process.pid))
        seconds = time.perf_counter() - started
    finally:
        os.killpg(process.pid, signal.SIGTERM)
    report(jobs, answers, good, right)
    click.echo(f"{requests / seconds:.0f} requests/s from {clients} clients")
    click.echo("memory, MB, before and after each 500 requests: " + ", ".join(f"{size:.0f}" for size in sizes))


def report(jobs: list[object], answers: list[tuple[int, str]], good: str, right: float) -> None:
    """Print how many answers were right; exit code 1 if any was wrong."""
    wrong = []
    for job, (status, body) in zip(jobs, answers, strict=True):
        if job == good:
            fine = status == 200 and abs(json.loads(body)["predictions"][0]["probability"] - right) < 1e-5
        else:
            fine = status == 400 and "root:" not in body
        if not fine:
            wrong.append((str(job)[:40], status, body[:200]))
    goods = sum(job == good for job in jobs)
    click.echo(f"{goods} valid and {len(jobs) - goods} invalid requests; {len(wrong)} wrong answers {wrong[:3]}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
