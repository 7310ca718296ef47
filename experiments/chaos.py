"""Kill `cxr` at random and at named moments, or fill its disk, then give the same command and compare all numbers.

    uv run python experiments/chaos.py --kills 200 --seed 0
    uv run python experiments/chaos.py --kills 50 --only train
    uv run python experiments/chaos.py --kills 0 --fills 50

Results in docs/reliability.md; those of an earlier script, with ResNet18, in LOG.md: "2026-11-22: kill -9 and resume,
20 kills during the run".

A share of the kills begins in an empty folder, the others with an empty store. Survived means: the command given again
(`cxr train --resume ID` where a run has begun) exits with 0; all metrics, predictions and versions equal those of the
undisturbed command, bit for bit; no run is RUNNING or SCHEDULED; no step, run or version is there twice; no temporary
file is left. The sampled rates of a search depend on who samples them: of a search, the first trial, whose rates are
the defaults, is compared, and the refit with its trial. Full disks are small tmpfs, which only root can mount.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import pandas as pd

from faults import (
    SIGNALS,
    SMALL,
    Fault,
    Outcome,
    Process,
    counting,
    has_ended,
    left_over,
    outcome,
    run_to_resume,
    with_fault,
)

LEFT = "left over"
SQL = "sqlalchemy.engine.default:DefaultDialect"
STORE = "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore"
MODELS = "mlflow.store.model_registry.sqlalchemy_store:SqlAlchemyStore"
OPTUNA = "optuna.storages._rdb.storage:RDBStorage"
# Moment -> the functions at whose calls the process is killed.
MOMENTS = {
    "store made": ["mlflow.store.db.utils:_upgrade_db", f"{SQL}.do_execute"],
    "image decoded": ["cxr.data.decode:decode_gray"],
    "folder renamed": ["pathlib:Path.rename"],
    "file renamed": ["pathlib:Path.replace"],
    "file flushed": ["os:fsync"],
    "run made": [f"{STORE}.create_run"],
    "SQL committed": [f"{SQL}.do_commit"],
    "metrics logged": [f"{STORE}.log_batch"],
    "artifact logged": ["mlflow.store.artifact.local_artifact_repo:LocalArtifactRepository.log_artifact"],
    "model logged": ["mlflow.store.artifact.local_artifact_repo:LocalArtifactRepository.log_artifacts"],
    "version registered": [f"{MODELS}.create_model_version", f"{MODELS}.create_registered_model"],
    "alias set": [f"{MODELS}.set_registered_model_alias"],
    "run ended": [f"{STORE}.update_run_info"],
    "folder removed": ["shutil:rmtree"],
    "study changed": [f"{OPTUNA}.set_study_user_attr", f"{OPTUNA}.create_new_trial"],
    "trial ended": [f"{OPTUNA}.set_trial_state_values", "cxr.studies.trial:keep_only"],
    "refit begun": ["cxr.studies.search:run_tracked", "cxr.studies.search:make_child"],
    "report made": ["cxr.studies.compare:_publish", "cxr.studies.crossval:_publish", "cxr.studies.search:publish"],
}
TIMED = "any time"
# Command -> (arguments, share of the kills).
COMMANDS = {
    "train": (["train", *SMALL, "--strategy", "gradual", "--epochs", "1"], 0.5),
    "tune": (
        ["tune", *SMALL, "--strategy", "frozen", "--epochs", "2", "--trials", "2", "--heartbeat", "1"],
        0.15,
    ),
    "compare": (
        ["compare", *SMALL, "--strategies", "frozen,full", "--epochs", "2", "--seeds", "1", "--jobs", "1"],
        0.15,
    ),
    "compare, 2 jobs": (
        ["compare", *SMALL, "--strategies", "frozen,full", "--epochs", "2", "--seeds", "1", "--jobs", "2"],
        0.05,
    ),
    "crossval": (["crossval", *SMALL, "--strategy", "frozen", "--epochs", "2", "--folds", "2", "--jobs", "1"], 0.15),
}
CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (130, -15), signal.SIGINT: (130, -2)}


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A command without faults: what it leaves, how long it takes, bytes it needs, calls of each target."""

    arguments: list[str]
    result: Outcome
    seconds: float
    size: int
    calls: dict[str, int]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A command to be disturbed: in which folder, from an empty one (`fresh`) or with an empty store."""

    number: int
    command: str
    moment: str
    number_of_signal: int
    fresh: bool
    seed: int


class Laboratory:
    """The images, an empty store, and what undisturbed commands give."""

    def __init__(self, work: Path, keep: bool):
        from cxr.data.phantoms import write_synthetic

        self.work, self.keep = work, keep
        self.data = write_synthetic(work / "phantoms", seed=1, train_patients=14, test_patients=6, size=64)
        self.store = work / "store"
        self.store.mkdir()
        assert Process(self.store, ["models", "list"]).wait() in (0, 2)
        self.known: dict[str, Undisturbed] = {}

    def folder(self, name: str, fresh: bool) -> Path:
        """A new folder, empty or with an empty store."""
        folder = self.work / name
        folder.mkdir()
        if not fresh:
            shutil.copy(self.store / "mlflow.db", folder)
        return folder

    def undisturbed(self, command: str) -> Undisturbed:
        """Run the command without a fault, from an empty folder."""
        if command not in self.known:
            folder, counts = self.folder(f"whole-{command.replace(', ', '-')}", True), self.work / "counts.json"
            arguments = [*COMMANDS[command][0], "--data-dir", str(self.data)]
            targets = [target for group in MOMENTS.values() for target in group]
            started = time.perf_counter()
            code = Process(folder, arguments, **counting(targets, counts)).wait()
            seconds = time.perf_counter() - started
            assert code == 0, (folder / "output.txt").read_text()
            assert not left_over(folder), left_over(folder)
            size = sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))
            self.known[command] = Undisturbed(arguments, outcome(folder), seconds, size, json.loads(counts.read_text()))
        return self.known[command]

    def killed(self, attempt: Attempt) -> dict[str, object]:
        """Kill it, repeat it, and judge."""
        whole, rng = self.undisturbed(attempt.command), random.Random(attempt.seed)
        folder = self.folder(f"kill-{attempt.number}", attempt.fresh)
        what, codes = attempt.moment, CODES[signal.Signals(attempt.number_of_signal)]
        if attempt.moment == TIMED:
            after = rng.uniform(0, whole.seconds)
            process = Process(folder, whole.arguments)
            process.wait_at_most(after)
            process.send(attempt.number_of_signal)
            what = f"after {after:.2f} s"
        else:
            fault = self._fault(attempt, whole, rng)
            process = Process(folder, whole.arguments, **with_fault(fault))
            what = f"{'after' if fault.after else 'before'} call {fault.call} of {fault.target}"
        code = process.wait()
        reasons = [] if code in (0, *codes) else [f"exit code {code}"]
        if code == 0:  # it was ending already
            reasons += judged(folder, whole)
        elif has_ended(folder):  # what it has left, the next command removes
            reasons += [reason for reason in judged(folder, whole) if not reason.startswith(LEFT)]
        else:
            reasons += self.continued(folder, whole)
        return self._row(attempt, what, code in codes or None, reasons, folder)

    def _fault(self, attempt: Attempt, whole: Undisturbed, rng: random.Random) -> Fault:
        """At one of the calls that the undisturbed command made."""
        target = rng.choice([target for target in MOMENTS[attempt.moment] if whole.calls.get(target)])
        return Fault(target, rng.randint(1, whole.calls[target]), attempt.number_of_signal, rng.random() < 0.5)

    def filled(self, attempt: Attempt) -> dict[str, object]:
        """Run it on a disk that is too small, make space, repeat it, and judge."""
        whole, rng = self.undisturbed(attempt.command), random.Random(attempt.seed)
        made = 0 if attempt.fresh else (self.store / "mlflow.db").stat().st_size + 50_000
        size = int(rng.uniform(made or 50_000, 1.05 * whole.size))
        folder = self.work / f"fill-{attempt.number}"
        with small_disk(folder, size) as grow:
            if not attempt.fresh:
                shutil.copy(self.store / "mlflow.db", folder)
            (self.work / "outputs").mkdir(exist_ok=True)
            log = self.work / "outputs" / f"fill-{attempt.number}.txt"
            (folder / "output.txt").symlink_to(log)  # what is printed goes to another disk
            code = Process(folder, whole.arguments).wait()
            printed = log.read_text()
            reasons = []
            if code not in (0, 2):
                reasons.append(f"exit code {code}")
            if "Traceback" in printed or (code == 2 and not any(x in printed for x in ("space", "full", "disk"))):
                reasons.append("no clear line")
            grow()
            reasons += self.continued(folder, whole) if code else judged(folder, whole)
            return self._row(attempt, f"{size} bytes", code != 0 or None, reasons, log)

    def continued(self, folder: Path, whole: Undisturbed) -> list[str]:
        """Give the command again; what is wrong then."""
        run = run_to_resume(folder) if whole.arguments[0] == "train" else None
        arguments = ["train", "--resume", run] if run else whole.arguments
        code = Process(folder, arguments).wait()
        if code == 2 and "there is nothing to resume" in (folder / "output.txt").read_text():
            code = 0  # it was finished
        if code is None:
            return ["still at work after half an hour when given again"]
        return ([f"exit code {code} when given again"] if code else []) + judged(folder, whole)

    def _row(self, attempt: Attempt, what: str, hit: bool | None, reasons: list[str], where: Path) -> dict[str, object]:
        if where.is_dir() and not reasons and not self.keep:
            shutil.rmtree(where)
        return {
            "n": attempt.number,
            "command": attempt.command,
            "signal": SIGNALS.get(signal.Signals(attempt.number_of_signal), "")
            if attempt.number_of_signal
            else "disk full",
            "moment": attempt.moment,
            "fresh": attempt.fresh,
            "what": what,
            "hit": bool(hit),
            "lost": "; ".join(reasons),
            "where": str(where) if reasons else "",
        }


def judged(folder: Path, whole: Undisturbed) -> list[str]:
    """What is not as after the undisturbed command."""
    try:
        found = outcome(folder)
    except Exception as error:  # a store that cannot be read
        return [f"store: {error}"]
    expected = whole.result
    reasons = [f"{run} is {status}" for run, status in found.statuses.items() if status in ("RUNNING", "SCHEDULED")]
    reasons += [f"twice: {each}" for each in found.twice]
    side_by_side = "2" in whole.arguments[-3:-1]  # which of the two is registered last is not fixed
    search = whole.arguments[0] == "tune"  # of which another trial may be the best
    alias = {name: run for name, run in found.aliases.items() if not (search or (side_by_side and name == "candidate"))}
    if (
        found.versions != expected.versions
        or found.aliases.keys() != expected.aliases.keys()
        or not alias.items() <= expected.aliases.items()
    ):
        reasons.append(f"versions {found.versions} {found.aliases}")
    reasons += [f"{LEFT}: {name}" for name in left_over(folder)]
    if search:
        return reasons + _judged_search(found, expected)
    if found.numbers != expected.numbers:
        reasons.append("other numbers")
    if found.tables != expected.tables:
        reasons.append("other predictions")
    return reasons


def _judged_search(found: Outcome, expected: Outcome) -> list[str]:
    """The trials are there, the first gives what it gave, and the refit what its trial gave."""
    reasons = []
    if len(found.trials) != len(expected.trials):
        reasons.append(f"{len(found.trials)} complete trials")
    if expected.trials[0] not in found.trials.values():
        reasons.append("the first trial has another value")
    refits = [numbers for label, numbers in found.numbers.items() if label.startswith("refit")]
    best = [min(v for (key, _), v in each.items() if key == "val_loss") for each in refits]
    if best != [min(found.trials.values(), default=-1.0)]:
        reasons.append(f"refit {best}, trials {found.trials}")
    return reasons


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[object]:
    """A file system of so many bytes at `folder`; what is yielded makes it larger."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def planned(count: int, seed: int, only: str | None, known: dict[str, Undisturbed], fills: bool) -> list[Attempt]:
    """The attempts, spread over commands, signals and moments."""
    rng = random.Random(seed)
    attempts: list[Attempt] = []
    for command, whole in known.items():
        total = sum(COMMANDS[name][1] for name in known)
        own = round(count * COMMANDS[command][1] / total)
        moments = [m for m, targets in MOMENTS.items() if any(whole.calls.get(target) for target in targets)]
        for index in range(own):
            named = "2 jobs" not in command and index % 3 != 0
            moment = "" if fills else moments[(2 * index // 3) % len(moments)] if named else TIMED
            number = 0 if fills else list(SIGNALS)[(index + index // 3) % 3]
            fresh = moment == "store made" or rng.random() < 0.2
            attempts.append(Attempt(len(attempts), command, moment, number, fresh, rng.randrange(2**31)))
    rng.shuffle(attempts)  # so that a part of them is a fair sample
    return attempts


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--fills", default=0, show_default=True, help="disks that fill")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", type=click.Choice(list(COMMANDS)), help="this command")
@click.option("--at-once", default=2, show_default=True)
@click.option("--number", type=int, help="only the attempt of this number")
@click.option("--out", type=click.Path(path_type=Path), help="write all attempts to this CSV")
@click.option("--keep", is_flag=True, help="keep the folders of those that survived")
def main(
    kills: int, fills: int, seed: int, only: str | None, at_once: int, number: int | None, out: Path | None, keep: bool
) -> None:
    """Run the experiment and print its table."""
    laboratory = Laboratory(Path(tempfile.mkdtemp(prefix="chaos-")), keep)
    for command in [only] if only else COMMANDS:
        whole = laboratory.undisturbed(command)
        click.echo(f"{command}: {whole.seconds:.1f} s undisturbed, {whole.size / 1e6:.1f} MB")
    rows: list[dict[str, object]] = []
    with ThreadPoolExecutor(at_once) as pool:
        jobs = [
            pool.submit(laboratory.killed, each)
            for each in planned(kills, seed, only, laboratory.known, False)
            if number is None or each.number == number
        ]
        jobs += [
            pool.submit(laboratory.filled, each)
            for each in planned(fills, seed, only, laboratory.known, True)
            if number is None or each.number == number
        ]
        for job in as_completed(jobs):
            rows.append(job.result())
            click.echo(json.dumps(rows[-1]))
    table = pd.DataFrame(rows)
    if out:
        table.to_csv(out, index=False)
    click.echo(summary(table).to_string(index=False))
    lost = int((table["lost"] != "").sum())
    click.echo(f"{len(table) - lost} of {len(table)} survived; folders of the others are in {laboratory.work}")
    sys.exit(1 if lost else 0)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A line for each command, signal and moment."""
    table = table.assign(survived=table["lost"] == "", lost=table["lost"] != "")
    groups = table.groupby(["command", "signal", "moment"], sort=False)
    return groups[["hit", "survived", "lost"]].sum().assign(attempts=groups.size()).reset_index()


if __name__ == "__main__":
    main()
