"""Options and MLproject derived from the configuration."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import mlflow
import mlflow.projects
import pytest
from click.testing import CliRunner
from mlflow.exceptions import ExecutionException
from mlflow.projects.utils import get_run_env_vars
from narrow import ARCH
from started import Started

from cxr.config import TrainCommand, TrainConfig, configure
from cxr.options import options


def parse(*arguments: str) -> TrainConfig:
    """The configuration that a command with the derived options parses from its arguments."""
    seen: list[TrainConfig] = []

    @click.command()
    @options(TrainCommand)
    def command(**parameters: Any) -> None:
        seen.append(configure(TrainCommand, parameters).train)

    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_no_arguments_give_the_defaults() -> None:
    assert parse() == TrainConfig()


def test_hyphens_and_underscores_are_equivalent() -> None:
    expected = replace(TrainConfig(), batch_size=8, lr_top=2e-4)
    assert parse("--batch-size", "8", "--lr-top", "2e-4") == expected
    assert parse("--batch_size", "8", "--lr_top", "0.0002") == expected


ROOT = Path(__file__).parent.parent


class Submitted:
    """What MLflow waits for after it has started the command of an entry point."""

    def __init__(self, command: str, work_dir: str, experiment_id: str, run_id: str):
        assert command.startswith("python -m cxr ")
        self.run_id = run_id
        variables = get_run_env_vars(run_id, experiment_id)
        self.process, self.output = Started(*shlex.split(command)[3:], **variables), ""

    def wait(self) -> bool:
        code, self.output = self.process.finish()
        return code == 0


@pytest.fixture
def project(in_store: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Submitted]:
    """`mlflow run .` without two interpreters to start: MLflow's own function, and the command in a forked process."""
    started: list[Submitted] = []

    def submit(*arguments: Any, **named: Any) -> Submitted:
        started.append(Submitted(*arguments, **named))
        return started[-1]

    def run(**options: Any) -> Submitted:
        try:
            mlflow.projects.run(str(ROOT), env_manager="local", **options)
        except ExecutionException as error:
            raise AssertionError(started[-1].output) from error
        return started[-1]

    monkeypatch.setattr("mlflow.projects.backend.local._run_entry_point", submit)
    return run


def mlflow_run(store: str, phantoms: Path, cache: Path, *parameters: str) -> subprocess.Popen[str]:
    """Start `mlflow run .` on tiny phantoms in a process group of its own."""
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "cxr"]
    values = [f"data_dir={phantoms}", "weights=random", "image_size=64", "bootstrap=0", "views=1", "register=none"]
    for value in (*values, *parameters):
        command += ["-P", value]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "CXR_CACHE": str(cache), "PATH": path}
    environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_mlflow_run_stopped_by_ctrl_c_resumes_in_the_same_run(
    in_store: str, phantoms: Path, own_cache: Path, project: Callable[..., Submitted]
) -> None:
    before = mlflow.search_runs(search_all_experiments=True, output_format="list")
    with mlflow_run(in_store, phantoms, own_cache, "strategy=gradual", "epochs=2") as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("epoch  1"):
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) != 0
    stopped = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
    assert stopped.info.status in ("KILLED", "FAILED")  # MLflow 3.17 overwrites KILLED with FAILED
    assert stopped.data.tags["cxr.error"] == "stopped by the user"
    project(run_id=stopped.info.run_id)
    resumed = mlflow.get_run(stopped.info.run_id)
    assert resumed.info.status == "FINISHED"
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == len(before) + 1
    history = mlflow.MlflowClient().get_metric_history(resumed.info.run_id, "val_loss")
    assert [entry.step for entry in history] == list(range(6))
    assert resumed.data.params["train.strategy"] == "gradual"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "parameters", "kind", "members"),
    [
        ("tune", {"strategy": "frozen", "epochs": 1, "trials": 2, "refit": "false"}, "search", 2),
        ("compare", {"strategies": "frozen", "epochs": 1, "seeds": 1}, "comparison", 1),
        ("crossval", {"strategy": "frozen", "epochs": 1, "folds": 2, "val_fraction": 0.3}, "crossval", 2),
    ],
)
def test_the_run_created_by_mlflow_run_is_the_parent(
    project: Callable[..., Submitted],
    phantoms: Path,
    tmp_path: Path,
    entry: str,
    parameters: dict[str, Any],
    kind: str,
    members: int,
) -> None:
    values = {"data_dir": phantoms, "arch": ARCH, "weights": "random", "image_size": 64, "bootstrap": 0, "views": 1}
    own = {"storage": f"sqlite:///{tmp_path / 'optuna.db'}"} if entry == "tune" else {}
    before = len(mlflow.search_runs(search_all_experiments=True, output_format="list"))
    project(entry_point=entry, experiment_name="cxr", parameters={**values, "register": "none", **parameters, **own})
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")[: -before or None]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.data.tags["cxr.kind"] for run in parents] == [kind]
    assert len(runs) == 1 + members
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs} == {None, parents[0].info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
def test_mlflow_run_with_an_invalid_parameter_fails_with_the_reason(
    in_store: str, phantoms: Path, own_cache: Path
) -> None:
    with mlflow_run(in_store, phantoms, own_cache, "strategy=halves") as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: --strategy halves: unknown; choose one of frozen, partial, full, gradual" in output
    newest = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
    assert newest.info.status == "FAILED"
    assert "--strategy halves" in newest.data.tags["cxr.error"]
