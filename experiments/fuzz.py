"""Mutated input for everything that reads what others wrote: images, lists, weights, model cards, parameters, requests.

    uv run python experiments/fuzz.py --share 1 --out finds

Each input is tried in another process. It must give a result or be refused in the way that its reader documents
(`UserError`, `ImageError`, status 400); all else is a find: another exception, more than 10 s, more than 1 GB, a crash.
Finds are made smaller and saved in `--out`; the exit code is then 1. Everything follows from `--seed`. Result in
docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
import torch
from pydicom.data import get_testdata_file
from safetensors.torch import save
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from cxr.cli import cli
from cxr.config import configure
from cxr.data.decode import ImageError, decode_gray, largest_value, pixels_of
from cxr.data.dicom import patient_of
from cxr.data.lists import read_list
from cxr.errors import UserError
from cxr.network.resnet import create
from cxr.network.weights import fit_weights, read_weights
from cxr.options import ENTRY_POINTS
from cxr.serving.predictor import CARD as CARD_FILE
from cxr.serving.predictor import DIGESTS, ModelCard, Predictor, save_package
from cxr.serving.request import Limits
from cxr.serving.server import Server
from cxr.task import KAGGLE
from cxr.tracking.registry import read_package
from mutations import dicoms, jpegs, mutated, mutated_json, mutated_png, pngs

SECONDS = 10.0
MEMORY = 1_000_000_000  # bytes above what the process held before
CARD = ModelCard("resnet18", 32, "squash", 0.5, "frozen", "0" * 12, "random", KAGGLE.class_to_index)
LIMITS = Limits(1_000_000, 8, 10_000_000, 5)
SHRINKS = 300  # attempts to make a find smaller


@dataclass(frozen=True, slots=True)
class Target:
    """What is tried: how many inputs, what makes one, and what reads it. `read` raises what the reader documents as
    `refusals` for bad input."""

    count: int
    make: Callable[[Random], bytes]
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]


def image(data: bytes) -> None:
    """Decode, and look at the header and the depth."""
    refused = None
    for read in (pixels_of, largest_value, lambda data: decode_gray(data, 64, "squash")):
        try:
            read(data)
        except ImageError as error:
            refused = error
    if refused:
        raise refused


def dicom(data: bytes) -> None:
    """As a file of that name, and its patient."""
    patient_of(data, b"key")
    decode_gray(data, 64, "pad", named_dicom=True)


@cache
def scratch() -> Path:
    """A folder of this process, with two images that lists name."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(pngs()[0])
    return folder


def manifest(data: bytes) -> None:
    """A list of images; the first byte tells of which kind."""
    file = scratch() / f"list{('.csv', '.tsv', '.json')[data[0] % 3 if data else 0]}"
    file.write_bytes(data[1:])
    read_list(file)


@cache
def network() -> nn.Module:
    """A small ResNet."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(128, 2)
    return model


def weights(data: bytes) -> None:
    """A file of weights, read and fitted to a network; the first byte tells of which kind."""
    file = scratch() / f"weights{('.pth', '.safetensors')[data[0] % 2 if data else 0]}"
    file.write_bytes(data[1:])
    fit_weights(network(), read_weights(file), str(file))


@cache
def package(name: str = "package") -> Path:
    """A packaged model."""
    folder = scratch() / name
    save_package(folder, create("resnet18", 2, 32).state_dict(), CARD)
    return folder


def card(data: bytes) -> None:
    """A package whose card this is; what can be read must predict."""
    (package() / CARD_FILE).write_bytes(data)
    (package() / DIGESTS).unlink(missing_ok=True)  # as in packages of earlier versions, which tell of no change
    predictor = read_package(package(), "models:/fuzzed/1")
    predictor.predict([predictor.prepare(pngs()[0])])
    predictor.card.text()


def parameter(data: bytes) -> None:
    """A command's option and its value."""
    command, option, value = data.split(b"\0", 2)
    arguments = [option.decode(), value.decode(errors="surrogateescape")]
    context = cli.commands[command.decode()].make_context(command.decode(), arguments)
    given = {name: value for name, value in context.params.items() if name not in ("first", "more")}
    config = next(each for each in ENTRY_POINTS.values() if each.command == command.decode())
    configure(config, given)


@cache
def server() -> Server:
    """That of a packaged model."""
    return Server(Predictor.load(package("served")), LIMITS, 1)


class RefusedError(Exception):
    """Status 400."""


def request(data: bytes) -> None:
    """The body of a request to the server."""
    sent: list[Any] = []

    async def ask() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": headers}
        await server()(scope, receive, send)

    asyncio.run(ask())
    if sent[0]["status"] == 400:
        raise RefusedError
    assert sent[0]["status"] == 200, sent[0]["status"]


def radiographs() -> list[bytes]:
    """Ours, and pydicom's in JPEG lossless and JPEG-LS, which GDCM decodes."""
    names = ("JPGLosslessP14SV1_1s_1f_8b.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm")
    found = [get_testdata_file(name, download=False) for name in names]
    return [*dicoms(), *(Path(path).read_bytes() for path in found if path)]


def mutants(seeds: Callable[[], list[bytes]], keep: int = 0) -> Callable[[Random], bytes]:
    """Makes mutations of seeds, of which the first bytes stay."""
    made: list[bytes] = []

    def make(random: Random) -> bytes:
        made.extend(() if made else seeds())
        chosen = random.choice(made)
        return chosen[:keep] + mutated(chosen[keep:], random)

    return make


def png(random: Random) -> bytes:
    """Its bytes mutated, or its chunks."""
    data = random.choice(pngs())
    return mutated(data, random) if random.random() < 0.3 else mutated_png(data, random)


def structured(seeds: Callable[[], list[bytes]], keep: int = 0) -> Callable[[Random], bytes]:
    """As `mutants` of JSON; of two thirds, the values are mutated rather than the text."""
    plain = mutants(seeds, keep)

    def make(random: Random) -> bytes:
        if random.random() < 0.33:
            return plain(random)
        seed = random.choice(seeds())
        try:
            return seed[:keep] + json.dumps(mutated_json(json.loads(seed[keep:]), random)).encode()
        except ValueError:  # a list that is no JSON
            return plain(random)

    return make


def lists() -> list[bytes]:
    """Lists of every kind, the first byte telling which."""
    csv = "image,label,patient,split\na.png,NORMAL,p1,train\nb.png,PNEUMONIA,p2,test\n"
    monai = {"training": [{"image": "a.png", "label": "x"}], "test": [{"image": "b.png", "label": "y", "subject": 1}]}
    plain = [{"path": "a.png", "label": 0}, {"path": "b.png", "label": 1}]
    files = [("\0", csv), ("\0", "\ufeff" + csv.replace(",", ";")), ("\0", 'path,label\n"a.png",x\n')]
    files += [("\1", csv.replace(",", "\t")), ("\2", json.dumps(monai)), ("\2", json.dumps(plain))]
    return [(kind + content).encode() for kind, content in files]


def states() -> list[bytes]:
    """Weights in both formats, whole and few, the first byte telling which."""
    few = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.bias": torch.zeros(64), "fc.bias": torch.zeros(2)}
    tiny = {"fc.bias": torch.zeros(2), "fc.weight": torch.zeros(2, 128)}
    half = {name: value.half() for name, value in tiny.items()}
    found = []
    for state in (few, tiny, half, network().state_dict()):
        file = scratch() / "seed.pth"
        torch.save(state, file)
        found += [b"\0" + file.read_bytes(), b"\1" + save({key: value.contiguous() for key, value in state.items()})]
    return found


def cards() -> list[bytes]:
    """Model cards of two classes and of more."""
    more = replace(CARD, class_to_index={"A": 0, "B": 1, "C": 2}, certainty_limit=0.2)
    return [CARD.text().encode(), more.text().encode()]


VALUES = (
    "nan",
    "-inf",
    "1e309",
    "-1",
    "0",
    "99999999999999999999",
    "0x10",
    "1_0",
    "",
    " ",
    "none",
    "auto",
    "ä",
    "\udc80",
)
TEXTS = ("sensitivity>=0.95", "cost 5:1", "2/5", "full=3,gradual=2", "partial,full", "lr,gamma", "path=Image,label=x")


def a_parameter(random: Random) -> bytes:
    """An option of a command with a strange value, or a mutated one."""
    command = random.choice(["train", "tune", "compare", "crossval"])
    option = random.choice([p for p in cli.commands[command].params if isinstance(p, click.Option) and not p.is_flag])
    value = str(random.choice([*VALUES, *TEXTS, option.default])).encode(errors="surrogateescape")
    value = mutated(value, random) if random.random() < 0.7 else value
    return f"{command}\0{option.opts[0]}\0".encode() + value.replace(b"\0", b"?")


def requests() -> list[bytes]:
    """Requests in the four forms, with one image and two."""
    texts = [base64.b64encode(data).decode() for data in (pngs()[0], jpegs()[0])]
    forms: list[Any] = [
        *({"instances": texts}, {"inputs": {"image": texts[:1]}}, {"dataframe_records": [{"image": texts[0]}]}),
        {"dataframe_split": {"columns": ["image"], "data": [[texts[0]]]}, "params": {}},
    ]
    return [json.dumps(form).encode() for form in forms]


USAGE = (UserError, click.UsageError)
TARGETS = {
    "JPEG": Target(4000, mutants(jpegs), image, (ImageError,)),
    "PNG": Target(4000, png, image, (ImageError,)),
    "DICOM": Target(5000, mutants(radiographs), dicom, (ImageError,)),
    "list": Target(3000, structured(lists, keep=1), manifest, (UserError,)),
    "weights": Target(2500, mutants(states, keep=1), weights, (UserError,)),
    "card": Target(1500, structured(cards), card, (UserError,)),
    "parameter": Target(2500, a_parameter, parameter, USAGE),
    "request": Target(2500, structured(requests), request, (RefusedError,)),
}


def outcome(target: Target, data: bytes) -> str:
    """`result`, `refused`, or what a find is and where."""
    try:
        target.read(data)
        return "result"
    except target.refusals as error:
        return "refused" if "\n" not in str(error).strip() else f"{type(error).__name__} of several lines"
    except BaseException as error:
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if "/cxr/" in frame.filename]
        place = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else "?"
        return f"{type(error).__name__} at {place}: {str(error)[:100]}"


def work(wire: Connection) -> None:
    """Try what comes over the wire, and send back its outcome and the memory it took in bytes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    for target in TARGETS.values():  # what is loaded once is not what an input takes
        outcome(target, target.make(Random(0)))
    virtual = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 4 * MEMORY, -1))
    wire.send("ready")
    while True:
        name, data = wire.recv()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        found = outcome(TARGETS[name], data)
        wire.send((found, _resident("VmHWM") - before))


def _resident(what: str) -> int:
    return int(re.findall(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


class Worker:
    """A process that tries inputs; a new one takes the place of one that hangs or crashes."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._wire, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        assert self._wire.recv() == "ready"

    def tried(self, name: str, data: bytes) -> str:
        """The outcome, or what went wrong with the process."""
        self._wire.send((name, data))
        found = "no answer in time"
        try:
            if self._wire.poll(SECONDS):
                found, memory = self._wire.recv()
                return f"more than {MEMORY / 1e9:g} GB" if memory > MEMORY else str(found)
        except EOFError:
            self._process.join()
            found = f"crash, exit code {self._process.exitcode}"
        self.end()
        self._start()
        return found

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def smaller(worker: Worker, name: str, data: bytes, found: str) -> bytes:
    """A part of an input that is found for the same reason, by leaving out ever smaller pieces."""
    size, tries = len(data) // 2, 0
    while size and tries < SHRINKS and "at " in found:  # not what ends the process: a new one takes seconds
        for start in range(0, len(data), size):
            shorter = data[:start] + data[start + size :]
            tries += 1
            if worker.tried(name, shorter).split(":")[0] == found.split(":")[0]:
                data = shorter
                break
        else:
            size //= 2
    return data


def numbers(share: float, only: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Which inputs to try."""
    for name, target in TARGETS.items():
        for number in range(round(target.count * share) if not only or name in only else 0):
            yield name, number


@click.command()
@click.option("--share", default=1.0, show_default=True, help="of the inputs")
@click.option("--only", multiple=True, type=click.Choice(list(TARGETS)), help="of these kinds; all if none is named")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="finds", show_default=True, help="folder for the finds")
def main(share: float, only: tuple[str, ...], seed: int, workers: int, out: Path) -> None:
    """Try mutated inputs and print a table."""
    counts: Counter[tuple[str, str]] = Counter()
    slowest: dict[str, float] = {}
    finds: dict[str, tuple[str, bytes, str]] = {}
    waiting = numbers(share, only)

    def run() -> None:
        worker = Worker()
        for name, number in waiting_items():
            data = TARGETS[name].make(Random(f"{seed}-{name}-{number}"))
            started = time.perf_counter()
            found = worker.tried(name, data)
            slowest[name] = max(slowest.get(name, 0), time.perf_counter() - started)
            kind = found if found in ("result", "refused") else "find"
            counts[name, kind] += 1
            if kind == "find" and (key := f"{name} {found.split(':')[0]}") not in finds:
                finds[key] = (name, smaller(worker, name, data, found), found)
        worker.end()

    lock = multiprocessing.Lock()

    def waiting_items() -> Iterator[tuple[str, int]]:
        while True:
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            yield item

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        os.environ["TMPDIR"] = folder  # of the workers, which leave files
        for done in [pool.submit(run) for _ in range(workers)]:
            done.result()
    report(counts, slowest, finds, out)
    sys.exit(int(bool(finds)))


def report(
    counts: Counter[tuple[str, str]], slowest: dict[str, float], finds: dict[str, tuple[str, bytes, str]], out: Path
) -> None:
    """Print the table and save the finds."""
    for name in slowest:
        results, refused, found = (counts[name, kind] for kind in ("result", "refused", "find"))
        click.echo(f"{name:10} {results:6} results {refused:6} refused {found:4} finds, slowest {slowest[name]:.2f} s")
    click.echo(f"{sum(counts.values())} inputs, {sum(counts[name, 'find'] for name in slowest)} finds")
    for number, (name, data, found) in enumerate(finds.values()):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}-{number}.bin").write_bytes(data)
        click.echo(f"{name}-{number}.bin ({len(data)} bytes): {found}")


if __name__ == "__main__":
    main()
