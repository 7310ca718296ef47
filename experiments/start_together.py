"""Start several `cxr` at the same moment in an empty folder: no store, experiment, cache, study or registry is there.

    uv run python experiments/start_together.py --rounds 10

Result in docs/reliability.md. Workers of a search that fail are in LOG.md: "2026-11-22: states in Optuna and MLflow
after failures of a search".

Four training runs register in the same model; three workers share a study; two different comparisons, and the same
cross-validation given twice, of which one is refused in one line. Each row says how many processes ended as they
should, and how many rounds left what they should: every run FINISHED, versions numbered 1 to n, the champion the best,
every trial once, one refit, no temporary file.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pandas as pd

from cxr.data.phantoms import write_synthetic
from faults import SMALL, Outcome, Process, left_over, outcome


@dataclass(frozen=True, slots=True)
class Scenario:
    """Commands that start together, the exit codes that they may have, sorted, and what the folder must hold then."""

    commands: list[list[str]]
    codes: list[int]
    wrong: Callable[[Outcome], list[str]]


def _runs(count: int, versions: int, found: Outcome) -> list[str]:
    reasons = [f"{run} is {status}" for run, status in found.statuses.items() if status != "FINISHED"]
    if len(found.statuses) != count:
        reasons.append(f"{len(found.statuses)} runs")
    numbers = sorted(int(each.split()[1]) for each in found.versions)
    if numbers != [*range(1, versions + 1)]:
        reasons.append(f"versions {numbers}")
    return reasons + [f"twice: {each}" for each in found.twice]


def _training(found: Outcome) -> list[str]:
    """Four runs, and the champion is the one of the lowest validation loss."""
    loss = {label: min(v for (key, _), v in n.items() if key == "val_loss") for label, n in found.numbers.items()}
    best = min(loss, key=lambda label: loss[label])
    champion = found.aliases.get("champion")
    return [*_runs(4, 4, found), *([] if champion == best else [f"champion {champion}, best {best}"])]


def _search(found: Outcome) -> list[str]:
    """A parent, four trials and the refit."""
    return [*_runs(6, 1, found), *([] if len(found.trials) == 4 else [f"{len(found.trials)} complete trials"])]


def scenarios() -> dict[str, Scenario]:
    """By name."""
    train = ["train", *SMALL, "--strategy", "frozen", "--epochs", "1"]
    tune = ["tune", *SMALL, "--strategy", "frozen", "--epochs", "1", "--trials", "4", "--heartbeat", "5"]
    compare = ["compare", *SMALL, "--strategies", "frozen", "--epochs", "1", "--seeds", "1", "--jobs", "1"]
    crossval = ["crossval", *SMALL, "--strategy", "frozen", "--epochs", "1", "--folds", "2", "--jobs", "1"]
    return {
        "4 train": Scenario([[*train, "--seed", str(n)] for n in range(4)], [0] * 4, _training),
        "3 workers of a tune": Scenario([tune] * 3, [0] * 3, _search),
        "2 compare": Scenario([[*compare, "--seed", str(n)] for n in range(2)], [0] * 2, lambda o: _runs(4, 2, o)),
        "the same crossval twice": Scenario([crossval] * 2, [0, 2], lambda found: _runs(3, 0, found)),
    }


@click.command()
@click.option("--rounds", default=10, show_default=True)
@click.option("--only", type=click.Choice(list(scenarios())), help="this one")
def main(rounds: int, only: str | None) -> None:
    """Run the experiment and print its table."""
    work = Path(tempfile.mkdtemp(prefix="together-"))
    data = write_synthetic(work / "phantoms", seed=1, train_patients=14, test_patients=6, size=64)
    rows = []
    for name in [only] if only else scenarios():
        row = {"together": name, "rounds": rounds, "processes": 0, "ended well": 0, "rounds right": 0}
        for number in range(rounds):
            good, wrong = tried(scenarios()[name], work / f"{name}-{number}".replace(" ", "-"), data)
            row["processes"] += len(scenarios()[name].commands)
            row["ended well"] += good
            row["rounds right"] += not wrong
            click.echo(f"{name}, round {number}: {'; '.join(wrong) or 'right'}")
        rows.append(row)
    table = pd.DataFrame(rows)
    click.echo(table.to_string(index=False))
    sys.exit(0 if (table["rounds right"] == rounds).all() else 1)


def tried(scenario: Scenario, folder: Path, data: Path) -> tuple[int, list[str]]:
    """(how many processes ended as they should, what is wrong)."""
    folder.mkdir()
    processes = [Process(folder, [*command, "--data-dir", str(data)]) for command in scenario.commands]
    codes = sorted(process.wait() or 0 for process in processes)
    good = sum(code == wanted for code, wanted in zip(codes, scenario.codes, strict=True))
    if codes != scenario.codes:
        return good, [f"exit codes {codes}, see {folder}/output.txt"]
    wrong = [*scenario.wrong(outcome(folder)), *(f"left over: {name}" for name in left_over(folder))]
    if not wrong:
        shutil.rmtree(folder)
    return good, wrong


if __name__ == "__main__":
    main()
