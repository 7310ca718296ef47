"""What the scripts share that disturb `cxr`: processes that start fast and kill themselves at a named moment, and
what a folder holds after them, read from the files, not through the code under test."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
sys.path[:0] = [str(SUPPORT)]
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")  # of the server, from which all are forked
PLAN, COUNTS = "CXR_FAULT_PLAN", "CXR_FAULT_COUNTS"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("mlflow", "mlflow.pyfunc", "mlflow.store.db.utils", "mlflow.store.tracking.sqlalchemy_store"),
        *("mlflow.store.model_registry.sqlalchemy_store", "alembic.command", "captum.attr", "pytest"),
        *("cxr.cli", "cxr.runs.train", "cxr.studies.search", "cxr.studies.compare", "cxr.studies.crossval"),
        *("cxr.figures.examples", "as_tests_run", "workers"),
    ]
)
# Metrics that differ from run to run.
CHANGING = ("seconds", "per_second", "memory", "system/", "test_uses_before")
LEFT_OVER = ("*.tmp", ".building-*", "*.making*", "*-journal")
SMALL = [
    "--arch",
    "narrow_resnet",
    "--weights",
    "random",
    "--image-size",
    "64",
    "--views",
    "1",
    "--bootstrap",
    "20",
    "--device",
    "cpu",
]


@dataclass(frozen=True, slots=True)
class Fault:
    """A signal that a process sends itself at the `call`-th call of a function (`module:name`), before or after it."""

    target: str
    call: int
    number: int
    after: bool

    def install(self) -> None:
        """From now on, in this process."""
        calls = 0

        def strike(function: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            due = calls == self.call
            if due and not self.after:
                os.kill(os.getpid(), self.number)
            result = function(*arguments, **options)
            if due and self.after:
                os.kill(os.getpid(), self.number)
            return result

        _replace(self.target, strike)


def _replace(target: str, wrapper: Any) -> None:
    module, _, name = target.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, last)

    def replaced(*arguments: Any, **options: Any) -> Any:
        return wrapper(original, *arguments, **options)

    setattr(owner, last, replaced)


def _count(targets: list[str], counts: Counter[str]) -> None:
    """Count how often each target is called."""
    for target in targets:

        def counted(function: Any, *arguments: Any, target: str = target, **options: Any) -> Any:
            counts[target] += 1
            return function(*arguments, **options)

        _replace(target, counted)


def _become(arguments: tuple[str, ...], folder: str, environment: dict[str, str]) -> None:
    """What `python -m cxr` does, in the forked process, in `folder`."""
    import pytest

    output = os.open(f"{folder}/output.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(environment)
    os.chdir(folder)
    import cxr.runs.record  # noqa: F401
    from cxr.cli import main

    as_tests_run = importlib.import_module("as_tests_run")
    as_tests_run.run_as_tests_do()
    importlib.import_module("workers").fork_workers(pytest.MonkeyPatch())
    if plan := environment.get(PLAN):
        Fault(**json.loads(plan)).install()
    counts: Counter[str] = Counter()
    targets, file = json.loads(environment.get(COUNTS, '[[], "/dev/null"]'))
    _count(targets, counts)
    sys.argv = ["cxr", *arguments]
    try:
        main()
    finally:
        Path(file).write_text(json.dumps(counts))


class Process:
    """`cxr ARGUMENTS` in a process of its own, with store, cache and temporary files in `folder`."""

    def __init__(self, folder: Path, arguments: list[str], **extra: str):
        self.folder = folder
        for name in ("tmp", "cache"):
            (folder / name).mkdir(exist_ok=True)
        environment = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "CXR_CACHE": str(folder / "cache"),
            "TMPDIR": str(folder / "tmp"),
            "TQDM_DISABLE": "1",
            **extra,
        }
        self._process = CONTEXT.Process(target=_become, args=(tuple(arguments), str(folder), environment))
        self._process.start()

    def send(self, number: int) -> None:
        """Send a signal, unless the process is gone."""
        if self._process.is_alive() and self._process.pid:
            os.kill(self._process.pid, number)

    def wait(self, seconds: float = 1800) -> int | None:
        """The exit code, negative for a signal; None, and the process killed, if it is still at work by then."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        return code

    def wait_at_most(self, seconds: float) -> bool:
        """Whether it has ended."""
        self._process.join(seconds)
        return self._process.exitcode is not None


def with_fault(fault: Fault) -> dict[str, str]:
    """The environment of a process that has this fault."""
    return {PLAN: json.dumps(asdict(fault))}


def counting(targets: list[str], file: Path) -> dict[str, str]:
    """The environment of a process that counts the calls."""
    return {COUNTS: json.dumps([targets, str(file)])}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a store holds: statuses of runs, the numbers of the finished ones, steps logged twice, versions."""

    statuses: dict[str, str]
    numbers: dict[str, dict[tuple[str, int], float]]
    tables: dict[str, str]
    twice: list[str]
    versions: list[str]
    aliases: dict[str, str]
    trials: dict[int, float]


def outcome(folder: Path) -> Outcome:
    """Read from the SQLite file and the artifacts. `numbers` and `tables` are by what a run is, not by its ID."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        query = "select run_uuid, status, artifact_uri from runs where lifecycle_stage = 'active'"
        runs = {run: (status, uri) for run, status, uri in store.execute(query)}
        tags = {run: dict(store.execute("select key, value from tags where run_uuid = ?", (run,))) for run in runs}
        metrics: dict[str, list[tuple[str, int, float]]] = defaultdict(list)
        for run, key, step, value in store.execute("select run_uuid, key, step, value from metrics"):
            metrics[run].append((key, step, value))
        versions = [f"{n} {v}" for n, v in store.execute("select name, version from model_versions order by version")]
        query = "select alias, run_id from registered_model_aliases join model_versions using (name, version)"
        aliases = {alias: _label(tags.get(run, {})) for alias, run in store.execute(query)}
    finished = {run: _label(tags[run]) for run, (status, _) in runs.items() if status == "FINISHED"}
    return Outcome(
        {run: status for run, (status, _) in runs.items()},
        {label: _numbers(metrics[run]) for run, label in finished.items()},
        {f"{label} {name}": text for run, label in finished.items() for name, text in _tables(runs[run][1]).items()},
        [f"{run} {key} {step}" for run in runs for key, step in _twice(metrics[run])]
        + [label for label, count in Counter(finished.values()).items() if count > 1],
        versions,
        aliases,
        _trials(folder / "optuna.db"),
    )


def _label(tags: dict[str, str]) -> str:
    names = ("cxr.kind", "cxr.comparison", "cxr.member", "strategy", "seed", "trial")
    return " ".join(tags.get(name, "-") for name in names)


def _numbers(metrics: list[tuple[str, int, float]]) -> dict[tuple[str, int], float]:
    return {(key, step): value for key, step, value in metrics if not any(part in key for part in CHANGING)}


def _twice(metrics: list[tuple[str, int, float]]) -> list[tuple[str, int]]:
    counts = Counter((key, step) for key, step, _ in metrics if not key.startswith("system/"))
    return [each for each, count in counts.items() if count > 1]


def _tables(uri: str) -> dict[str, str]:
    """Artifact -> digest of the tables that hold no times."""
    files = sorted(Path(uri.removeprefix("file://")).rglob("*predictions.csv"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _trials(database: Path) -> dict[int, float]:
    """Number -> value of the complete trials."""
    if not database.is_file():
        return {}
    with closing(sqlite3.connect(database)) as store:
        query = "select number, value from trials join trial_values using (trial_id) where state = 'COMPLETE'"
        return dict(store.execute(query))


def left_over(folder: Path) -> list[str]:
    """Temporary files and folders, checkpoints among them, that are there once all processes have ended."""
    found = [path for pattern in LEFT_OVER for path in folder.rglob(pattern)]
    found += [*(folder / "tmp").iterdir(), *(folder / "cache" / "runs").glob("*")]
    return [str(path.relative_to(folder)) for path in found]


def run_to_resume(folder: Path) -> str | None:
    """The run that has begun, if it has recorded its parameters."""
    return _found(folder, "join params using (run_uuid) where key = 'train.seed' order by start_time desc")


def has_ended(folder: Path) -> bool:
    """Whether the comparison or cross-validation is finished: given again, its command would begin another one."""
    ended = "join tags using (run_uuid) where key = 'cxr.kind' and value in ('comparison', 'crossval')"
    return _found(folder, f"{ended} and status = 'FINISHED'") is not None


def _found(folder: Path, which: str) -> str | None:
    """The ID of the first run in the store of a folder, if there is one, of which the end of a query holds."""
    database = folder / "mlflow.db"
    if not database.is_file() or not database.stat().st_size:
        return None
    with closing(sqlite3.connect(database)) as store:
        found = store.execute(f"select run_uuid from runs {which}").fetchone()
    return str(found[0]) if found else None


SIGNALS = {signal.SIGKILL: "kill -9", signal.SIGTERM: "kill -15", signal.SIGINT: "Ctrl-C"}
