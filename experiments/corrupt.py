"""Change one byte of a file that cxr, MLflow or Optuna wrote, or cut it off, and do what reads it.

    uv run python experiments/corrupt.py --faults 200

The result must be the undisturbed one, because the damage was found and made good or was in unused bytes, or the
command must end with one line. The exit code is 1 if a changed result was used or there was a traceback. SQLite has no
checksums: a value that is changed within MLflow's or Optuna's own file reads as another value, and is counted as
`unseen`. Result in docs/reliability.md.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import click
import mlflow
import pandas as pd
import torch

from cxr import cli
from cxr.config import TrainConfig
from cxr.data.load import Data, read_data
from cxr.data.phantoms import write_synthetic
from cxr.errors import UserError
from cxr.machine import ready_machine
from cxr.network.resnet import ready_model
from cxr.runs.train import run_tracked, train_model
from cxr.tracking.registry import downloaded, read_package
from cxr.tracking.tracker import NullTracker
from cxr.training.loop import EpochRecord

CHAMPION = "models:/cxr-pneumonia@champion"
SHARES = {"checkpoint": 0.3, "store": 0.2, "activations": 0.2, "package": 0.14, "MLflow": 0.08, "Optuna": 0.08}
STOP_AFTER = 2  # epochs, of which the second is of another phase


def quiet(line: str) -> None:
    """Discard the line."""


class InterruptedRunError(Exception):
    """The run ends here."""


@dataclass(frozen=True, slots=True)
class Case:
    """Files that are damaged one at a time, in a copy of `folder`, and what reads them there: it returns what it found,
    or raises `UserError`."""

    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], str]


def damage(file: Path, random: Random) -> str:
    """Flip a bit of one byte, or cut the file; for half of the flips the time of the last change is set back."""
    data, status = file.read_bytes(), file.stat()
    place = random.randrange(len(data))
    if random.random() < 0.25:
        file.write_bytes(data[:place])
        return f"cut at {place} of {len(data)}"
    changed = bytearray(data)
    changed[place] ^= 1 << random.randrange(8)
    file.write_bytes(changed)
    if random.random() < 0.5:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return f"byte {place} of {len(data)}"


def digest(model: torch.nn.Module, records: list[EpochRecord]) -> str:
    """Of all weights and losses."""
    sha = hashlib.sha256(repr([record.metrics["val_loss"] for record in records]).encode())
    for value in model.state_dict().values():
        sha.update(value.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything is, and how it is trained."""

    root: Path
    config: TrainConfig

    def at(self, folder: Path, **options: object) -> TrainConfig:
        """The configuration with its cache in that folder."""
        return replace(self.config, cache_dir=str(folder), **options)

    def trained(self, config: TrainConfig, stop: bool = False) -> str:
        """Train or resume without a tracker; with `stop`, end it after two epochs."""

        def watch(record: EpochRecord) -> None:
            if stop and record.epoch + 1 == STOP_AFTER:
                raise InterruptedRunError

        data, machine = read_data(config), ready_machine(config)
        model, _ = ready_model(config, len(data.task.classes), machine.device)
        records, _ = train_model(config, NullTracker("fault"), data, machine, model, quiet, watch)
        return digest(model, records)

    def files(self, folder: Path, *patterns: str) -> tuple[str, ...]:
        """Paths relative to the folder."""
        found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        assert found, patterns
        return tuple(str(path.relative_to(folder)) for path in found)

    def checkpoint(self) -> Case:
        """A run that was broken off, resumed."""
        folder = self.root / "checkpoint"
        with suppress(InterruptedRunError):
            self.trained(self.at(folder), stop=True)
        return Case(folder, self.files(folder, "runs/*/*"), lambda place: self.trained(self.at(place)))

    def store(self) -> Case:
        """Decoded images, opened again once their digest is remembered."""
        folder = self.root / "store"
        read_data(self.at(folder))
        return Case(folder, self.files(folder, "store/*/*/*"), lambda place: _images(read_data(self.at(place))))

    def activations(self) -> Case:
        """Outputs of a frozen prefix, used by another run."""
        folder, options = (
            self.root / "activations",
            {"strategy": "frozen", "epochs": 40, "patience": 1, "image_size": 64},
        )
        self.trained(self.at(folder, **options))
        shutil.rmtree(folder / "runs")
        files = self.files(folder, "activations/*/*.bin")
        return Case(folder, files, lambda place: self.trained(self.at(place, **options)))

    def package(self) -> Case:
        """A registered model, used."""
        folder = self.root / "package"
        shutil.copytree(downloaded(CHAMPION), folder)
        image = next(Path(self.config.data_dir).glob("test/*/*"))

        def predicted(place: Path) -> str:
            return str(read_package(place, CHAMPION).predict_files([image]).to_json())

        return Case(folder, self.files(folder, "*"), predicted)

    def tracking(self) -> Case:
        """MLflow's database: the registry is listed, and its champion used."""
        folder = self.root / "mlflow"
        image = str(next(Path(self.config.data_dir).glob("test/*/*")))

        def asked(place: Path) -> str:
            with store_at(f"sqlite:///{place / 'mlflow.db'}"):
                return command("models", "list") + command("predict", image, "--json")

        return Case(folder, ("mlflow.db",), asked)

    def study(self) -> Case:
        """Optuna's database: a study that is complete is asked for again."""
        folder = self.root / "optuna"
        folder.mkdir()
        names = ("data_dir", "weights", "image_size", "views", "bootstrap", "cache_dir")
        values = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(self.config, name)))]
        options = [*values, "--strategy", "frozen", "--epochs", "1", "--trials", "2", "--refit", "false"]

        def tuned(place: Path) -> str:
            lines = command("tune", *options, "--storage", f"sqlite:///{place / 'optuna.db'}").splitlines()
            return "\n".join(line for line in lines if "best" in line)

        tuned(folder)
        return Case(folder, ("optuna.db",), tuned)


def _images(data: Data) -> str:
    return hashlib.sha256(data.store.images.tobytes() + repr(sorted(data.store.rows.items())).encode()).hexdigest()


@contextmanager
def store_at(uri: str) -> Iterator[None]:
    """With another tracking store."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def command(*arguments: str) -> str:
    """What a command of cxr prints. Raises `UserError` if it ends with exit code 2 and one line."""
    out, error, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["cxr", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(error):
            cli.main()
    except SystemExit as stop:
        if stop.code:
            lines = [line for line in error.getvalue().splitlines() if line.startswith("error: ")]
            if stop.code != cli.BAD_INPUT or len(lines) != 1:
                raise RuntimeError(f"exit code {stop.code}: {error.getvalue()}") from stop
            raise UserError(lines[0]) from stop
    finally:
        sys.argv = before
    return out.getvalue()


def of_one_fault(case: Case, work: Path, expected: str, random: Random) -> tuple[str, str]:
    """(kind of outcome, what was done and seen)."""
    file = random.choice(case.files)
    done = f"{file}: {damage(work / file, random)}"
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = case.read(work)
    except UserError as error:
        return ("refused" if "\n" not in str(error) else "TRACEBACK"), f"{done}: {error}"
    except Exception as error:
        return "TRACEBACK", f"{done}: {type(error).__name__}: {str(error)[:300]}"
    rebuilt = any("damaged" in str(warning.message) for warning in said)
    if found == expected:
        return "rebuilt" if rebuilt else "same", done
    return "USED", f"{done}: {found[:200]}"


def faults(case: Case, name: str, count: int, root: Path) -> Iterator[tuple[str, str]]:
    """The outcome of each fault, in a new copy, and first of none, which tells what to expect."""
    expected = case.read(_copy(case, root / f"{name}-whole"))
    for number in range(count):
        work = _copy(case, root / f"{name}-{number}")
        if name == "store":  # its digest is remembered once its files are two seconds old
            time.sleep(2.1)
            case.read(work)
        outcome = of_one_fault(case, work, expected, Random(f"{name}-{number}"))
        shutil.rmtree(work, ignore_errors=True)
        yield ("unseen", outcome[1]) if outcome[0] == "USED" and name in ("MLflow", "Optuna") else outcome


def _copy(case: Case, work: Path) -> Path:
    shutil.copytree(case.folder, work)
    return work


def prepared(root: Path) -> Bench:
    """Phantoms, a tracking store with one finished run, and a configuration."""
    data = write_synthetic(root, seed=1, train_patients=16, test_patients=6, size=64)
    (root / "mlflow").mkdir()
    uri = f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("cxr", artifact_location=str(root / "artifacts"))
    config = TrainConfig(
        data_dir=str(data), weights="random", image_size=32, views=1, bootstrap=0, epochs=1, strategy="gradual",
        threads=1, cache_dir=str(root / "cache"),
    )  # fmt: skip
    run_tracked(replace(config, strategy="frozen"), say=quiet)
    return Bench(root, config)


@click.command()
@click.option("--faults", "total", default=200, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(SHARES)), help="of these kinds; all if none is named")
def main(total: int, only: tuple[str, ...]) -> None:
    """Inject the faults and print a table."""
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = prepared(Path(folder))
        cases = {
            "checkpoint": bench.checkpoint,
            "store": bench.store,
            "activations": bench.activations,
            "package": bench.package,
            "MLflow": bench.tracking,
            "Optuna": bench.study,
        }
        for name in only or cases:
            for kind, text in faults(cases[name](), name, round(SHARES[name] * total), bench.root):
                counts[name, kind] += 1
                if kind in ("USED", "TRACEBACK", "unseen"):
                    click.echo(f"{name}: {kind}: {text}")
    table = pd.Series(counts).unstack(fill_value=0).reindex([*(only or SHARES)])
    click.echo(table.to_string())
    sys.exit(int(any(kind in ("USED", "TRACEBACK") for _, kind in counts)))


if __name__ == "__main__":
    main()
