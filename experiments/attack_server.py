"""Serve a registered model by `cxr models serve` and attack it: garbage, slow clients and dropped connections among
good requests.

    MLFLOW_TRACKING_URI=sqlite:////…/mlflow.db uv run python experiments/attack_server.py --requests 20000 --clients 16

Every good request must get the model's own answer, every bad one status 400 within the limits, and nothing 5xx; memory
must not grow after the first 500 requests; no file named in a request may be opened, and nothing of one logged; and on
SIGTERM the requests that have begun must be answered. Exit code 1 if anything differs. With `--via mlflow` the same is
sent to `mlflow models serve`. Result in docs/reliability.md.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np

from cxr.config import ServeConfig
from cxr.data.decode import ImageError
from cxr.serving.predictor import Predictor
from cxr.tracking.registry import load
from mutations import dicoms, jpegs, mutated, pngs
from serve_load import memory

PART = 500  # requests between two looks at the server's memory
GROWTH = 1.10  # of memory after the first part, at most
TOLERANCE = 1e-5
PATIENCE = 120  # seconds
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Job:
    """A request: what it is, its bytes, the probabilities that answer it (None: status 400), and how it is sent."""

    kind: str
    body: bytes
    expected: list[float] | None = None
    content_type: str | None = JSON
    way: str = "plain"
    length: int | None = None


@dataclass
class Seen:
    """What was seen so far."""

    wrong: list[tuple[str, Any, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


def text(image: bytes) -> str:
    """Base64."""
    return base64.b64encode(image).decode()


def in_form(images: list[Any], random: Random) -> bytes:
    """A request for these values in one of the four forms of MLflow's protocol."""
    forms: list[Any] = [
        {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}},
        {"dataframe_records": [{"image": image} for image in images]},
        {"instances": images},
        {"inputs": {"image": images}},
    ]
    return json.dumps(random.choice(forms)).encode()


class Attack:
    """Makes the requests; each is a function of its number."""

    def __init__(self, predictor: Predictor, canary: Path, seed: int, sizes: tuple[int, ...] = (64, 80, 96)):
        self.predictor, self.canary, self.seed = predictor, canary, seed
        self.images = [data for size in sizes for make in (jpegs, pngs, dicoms) for data in make(size)]
        self.right = [self.answer(image) for image in self.images]

    def answer(self, image: bytes) -> float:
        """The model's own. Raises `ImageError`."""
        return float(self.predictor.predict([self.predictor.prepare(image)])["probability"][0])

    def job(self, number: int) -> Job:
        """Of each hundred, 78 good, one of them in small pieces, 20 bad and 2 broken off."""
        random = Random(f"{self.seed}-{number}")
        place = number % 100
        if place < 2:
            return Job("dropped", self.good(random).body, way="dropped")
        if place < 22:
            return self.bad(random)
        return self.good(random, "slow" if place == 99 else "plain")

    def good(self, random: Random, way: str = "plain", count: int | None = None) -> Job:
        """One to three images, or that many."""
        chosen = [random.randrange(len(self.images)) for _ in range(count or random.choice((1, 1, 1, 2, 3)))]
        body = in_form([text(self.images[each]) for each in chosen], random)
        return Job("good", body, [self.right[each] for each in chosen], way=way)

    def bad(self, random: Random) -> Job:
        """Garbage of a kind chosen at random."""
        makers = [self._mutated_image] * 4 + [self._mutated_json] * 2 + [self._wrong_value] * 2 + [self._over_limit] * 2
        return random.choice([*makers, self._wrong_shape])(random)

    def _mutated_image(self, random: Random) -> Job:
        """Some mutants are images still, and must be answered as the model does."""
        image = mutated(random.choice(self.images), random)
        body = in_form([text(image)], random)
        try:
            return Job("image", body, [self.answer(image)])
        except ImageError:
            return Job("image", body)

    def _mutated_json(self, random: Random) -> Job:
        body = self.good(random).body
        return Job("json", body[: random.randrange(len(body))] + random.choice((b"", b"\xff", b"}" * 9, b"\0")))

    def _wrong_value(self, random: Random) -> Job:
        path = str(self.canary)
        values: list[Any] = [path, f"file://{path}", text(path.encode()), "http://127.0.0.1/x.png", "%%%", "", None]
        values += [7, 1e308, True, [[1] * 40] * 3, {"b64": "QQ=="}, "\ud800", "ä", "A" * 9_999]
        return Job("value", in_form([random.choice(values)], random))

    def _wrong_shape(self, random: Random) -> Job:
        bodies: list[bytes] = [
            b"",
            b"[]",
            b"{}",
            b"null",
            b"7" * 5000,
            b"[" * 50_000,
            b'{"instances":' * 99,
            b"\xff\xfe",
        ]
        bodies += [b'{"instances": []}', b'{"instances": {}}', b'{"inputs": {"a": ["QQ=="], "b": ["QQ=="]}}']
        bodies += [b'{"dataframe_split": {"data": [["QQ==", "QQ=="]]}}', b'{"dataframe_split": [1]}', b'{"other": []}']
        types = random.choice((JSON, JSON, JSON, None, "text/csv", "application/x-parquet", "application/json; a=\x80"))
        return Job("shape", random.choice(bodies), content_type=types)

    def _over_limit(self, random: Random) -> Job:
        limits = ServeConfig()
        kind = random.choice(("images", "pixels", "bytes announced", "bytes"))
        if kind == "images":
            return Job(kind, in_form([text(self.images[0])] * (limits.max_images + random.choice((1, 2900))), random))
        if kind == "pixels":
            return Job(kind, in_form([text(_black())] * 3, random))
        if kind == "bytes":
            return Job(kind, b"A" * 1_000_000, way="chunked")
        return Job(kind, b"{", length=1_500_000_000)


def _black() -> bytes:
    """A PNG whose header claims 49 million pixels."""
    data = bytearray(pngs()[0])
    data[16:24] = (7000).to_bytes(4, "big") * 2
    return bytes(data)


class Client(threading.local):
    """A connection of each thread, kept until the server closes it."""

    def __init__(self, port: int):
        self.port = port
        self.connection: http.client.HTTPConnection | None = None

    def send(self, job: Job) -> tuple[int, bytes]:
        """(status, body) of the answer; status 0 for a dropped connection, which has none."""
        if job.way in ("dropped", "slow") or job.length:
            return self._in_pieces(job)
        if job.way == "chunked":
            return self._chunked(job)
        headers = {"Content-Type": job.content_type} if job.content_type else {}
        for _ in range(2):  # again if the server closed the idle connection meanwhile
            try:
                connection = self.connection = self.connection or self._open()
                connection.request("POST", "/invocations", job.body, headers)
                return self._read(connection)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self.connection = None
        return -1, b"the connection was closed twice"

    def _open(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def _read(self, connection: http.client.HTTPConnection) -> tuple[int, bytes]:
        answer = connection.getresponse()
        body = answer.read()
        if answer.will_close:
            self.connection = None
        return answer.status, body

    def _in_pieces(self, job: Job) -> tuple[int, bytes]:
        """Headers, a part of the body, and after a while the rest; or the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as wire:
            length = job.length or len(job.body)
            head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {length}\r\n\r\n"
            wire.sendall(head.encode())
            half = len(job.body) // 2
            wire.sendall(job.body[:half])
            if job.way == "dropped":
                return 0, b""
            for start in range(half, len(job.body), max(1, half // 4)):
                time.sleep(0.3 if job.way == "slow" else 0)
                wire.sendall(job.body[start : start + max(1, half // 4)])
            answer = http.client.HTTPResponse(wire)
            answer.begin()
            return answer.status, answer.read()

    def _chunked(self, job: Job) -> tuple[int, bytes]:
        """The body again and again, of a length that is not announced, until the limit is passed."""
        times = int(ServeConfig().max_mb) + 2
        connection = self._open()
        chunks: Iterator[bytes] = (job.body for _ in range(times))
        connection.request("POST", "/invocations", chunks, {"Content-Type": JSON}, encode_chunked=True)
        return self._read(connection)


def judge(job: Job, status: int, body: bytes) -> str | None:
    """What is wrong with an answer, or None."""
    if job.way == "dropped":
        return None
    if job.expected is None:
        text = body.decode(errors="replace")
        fine = status == 400 and "Traceback" not in text and "root:" not in text and "site-packages" not in text
        return None if fine else "a bad request not refused as such"
    if status != 200:
        return "a good request not answered"
    found = [row["probability"] for row in json.loads(body)["predictions"]]
    same = len(found) == len(job.expected) and np.allclose(found, job.expected, atol=TOLERANCE)
    return None if same else "another answer than the model's"


def sent(client: Client, attack: Attack, number: int, seen: Seen, lock: threading.Lock) -> None:
    """Send one request and note what came of it."""
    job = attack.job(number)
    started = time.perf_counter()
    try:
        status, body = client.send(job)
    except (OSError, http.client.HTTPException) as error:
        status, body = -1, repr(error).encode()
    seconds = time.perf_counter() - started
    problem = judge(job, status, body)
    with lock:
        seen.kinds[f"{job.kind}{'' if job.way == 'plain' else f' ({job.way})'}: {status}"] += 1
        if job.expected is not None and job.way == "plain":
            seen.seconds.append(seconds)
        if problem:
            seen.wrong.append((f"{number} {job.kind}: {problem}", status, body[:200].decode(errors="replace")))


def start(via: str, uri: str, port: int, workers: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a server, its output in `log`, and wait until it answers."""
    commands = {
        "cxr": ["cxr", "models", "serve", "--model", uri, "--port", str(port)],
        "mlflow": ["mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(port)],
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("wb") as stream:
        command, environment = (
            [sys.executable, "-m", *commands[via], "--workers", str(workers)],
            os.environ | {"PATH": path},
        )
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=stream, stderr=stream)
    for _ in range(240):
        time.sleep(1)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as wire:
                wire.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if wire.recv(64).startswith(b"HTTP/1.1 200"):
                    return process
        except OSError:
            continue
    raise TimeoutError("the server did not answer within 4 minutes")


def drained(process: subprocess.Popen[bytes], attack: Attack, port: int, clients: int) -> tuple[int, float]:
    """How many of `clients` requests that have begun when SIGTERM comes are answered rightly, and how long it took the
    server to end, in seconds."""
    jobs = [attack.good(Random(number), "slow", 16) for number in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        answers = [pool.submit(Client(port).send, job) for job in jobs]
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        started = time.perf_counter()
        process.wait(PATIENCE)
        seconds = time.perf_counter() - started
        failed = [answer.exception() or judge(job, *answer.result()) for job, answer in zip(jobs, answers, strict=True)]
    return failed.count(None), seconds


@click.command()
@click.option("--model", default="models:/cxr-pneumonia@champion", show_default=True)
@click.option("--requests", default=20_000, show_default=True)
@click.option("--clients", default=16, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--port", default=5078, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--via", type=click.Choice(["cxr", "mlflow"]), default="cxr", show_default=True)
def main(model: str, requests: int, clients: int, workers: int, port: int, seed: int, via: str) -> None:
    """Attack the server and print what happened."""
    with tempfile.TemporaryDirectory() as folder:
        canary, log = Path(folder) / "canary.png", Path(folder) / "server.log"
        canary.write_bytes(pngs()[0])
        os.utime(canary, (1, time.time()))  # opened long before it was changed: the next reading is noted
        attack = Attack(load(model), canary, seed)
        process = start(via, model, port, workers, log)
        try:
            seen, sizes, seconds = storm(attack, Client(port), process.pid, requests, clients)
            answered, ended = drained(process, attack, port, clients)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        lines = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("serving on")]
        opened = canary.stat().st_atime != 1
    report(seen, sizes, requests / seconds)
    click.echo(f"SIGTERM: {answered} of {clients} requests that had begun were answered, ended after {ended:.1f} s")
    click.echo(f"the file that requests name was {'OPENED' if opened else 'never opened'}; {len(lines)} lines logged")
    for line in lines[:3]:
        click.echo(f"  {line[:200]}")
    flat = max(sizes[2:], default=0.0) <= GROWTH * sizes[min(1, len(sizes) - 1)]
    sys.exit(int(bool(seen.wrong) or answered < clients or opened or bool(lines) or not flat))


def storm(attack: Attack, client: Client, pid: int, requests: int, clients: int) -> tuple[Seen, list[float], float]:
    """Send all requests; returns what was seen, memory in MB before and after each part, and the seconds taken."""
    seen, lock, sizes, started = Seen(), threading.Lock(), [memory(pid)], time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for first in range(0, requests, PART):
            numbers = range(first, min(first + PART, requests))
            list(pool.map(lambda number: sent(client, attack, number, seen, lock), numbers))
            sizes.append(memory(pid))
    return seen, sizes, time.perf_counter() - started


def report(seen: Seen, sizes: list[float], rate: float) -> None:
    """Print the counts, the times and the memory."""
    for kind, count in sorted(seen.kinds.items()):
        click.echo(f"{count:7} {kind}")
    click.echo(f"{len(seen.wrong)} wrong answers")
    for wrong in seen.wrong[:10]:
        click.echo(f"  {wrong}")
    p50, p95, p99 = (1000 * float(value) for value in np.percentile(seen.seconds, [50, 95, 99]))
    click.echo(f"{rate:.0f} requests/s; good ones: p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f} ms")
    click.echo(f"memory, MB, before and after each {PART} requests: " + ", ".join(f"{size:.0f}" for size in sizes))


if __name__ == "__main__":
    main()
