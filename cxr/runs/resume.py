"""Whether an interrupted run can be resumed, and with which configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cxr.config import NEUTRAL, TrainConfig, before_they_existed, flatten, same_result, unflatten
from cxr.errors import UserError
from cxr.parameters import types_of
from cxr.storage import Cache, exclusive, holds_nothing, remove_abandoned, remove_folder
from cxr.tracking.lifecycle import was_killed
from cxr.tracking.outage import is_outage
from cxr.tracking.reading import LoggedRun, RunKind, unfinished_run
from cxr.training.checkpoint import LAST

# Runs with the parameters of a training run that are not one -> what to do instead of `--resume`.
NO_TRAINING_RUNS = {
    RunKind.SEARCH: "run its `cxr tune` command again",
    RunKind.TRIAL: "run the `cxr tune` command of its search again",
    RunKind.COMPARISON: "run its `cxr compare` command again",
    RunKind.CROSSVAL: "run its `cxr crossval` command again",
    RunKind.EVALUATION: "run its `cxr evaluate` command again",
    RunKind.ENSEMBLE: "run its `cxr models ensemble` command again",
}

ENDED = ("FINISHED", "FAILED", "KILLED")


def checkpoints_of(config: TrainConfig, run_id: str) -> Path:
    """The folder with the checkpoints of a run that has this configuration."""
    return Cache.open(config.cache_dir).checkpoints(run_id)


def outbox_of(config: TrainConfig) -> Callable[[str], Path]:
    """The folder, for a run ID, of what a run with this configuration has logged and not delivered."""
    return Cache.open(config.cache_dir).outbox


def remove_finished(config: TrainConfig) -> None:
    """Remove what runs left that were killed before they could do so: checkpoints of finished ones, empty folders."""
    runs = checkpoints_of(config, "any").parent
    remove_abandoned(runs)
    for folder in runs.glob("*"):
        try:
            _remove_unneeded(folder)
        except OSError:  # another process was faster
            continue
        except UserError as error:  # a run of another store, or at work
            if is_outage(error):  # whoever begins a run says so, once
                return


def _remove_unneeded(folder: Path) -> None:
    run = LoggedRun.open(folder.name)
    if run.finished or ((run.status in ENDED or was_killed(run.tags)) and holds_nothing(folder)):
        with exclusive(folder):  # which leaves no empty folder
            if run.finished:
                remove_folder(folder)


def can_continue(run: LoggedRun, config: TrainConfig) -> bool:
    """Whether an interrupted run has these parameters, and the checkpoint of its epochs is on this machine."""
    return has_parameters(run, config) and has_checkpoint(run, config)


def has_checkpoint(run: LoggedRun, config: TrainConfig) -> bool:
    """Whether the checkpoint of a run's epochs, if it has logged any, is on this machine."""
    return "val_loss" not in run.metrics or (checkpoints_of(config, run.run_id) / LAST).exists()


def has_parameters(run: LoggedRun, config: TrainConfig) -> bool:
    """Whether a run was recorded with these parameters, or such as give the same bits; it keeps its own threads,
    figures and patience."""
    recorded = before_they_existed() | dict(run.params)
    wanted = {key: value for key, value in flatten(config).items() if not _is_new_and_neutral(key, run)}
    for free in ("train.threads", "train.figures", "train.tracking_patience"):
        wanted.pop(free, None)
    return all(same_result(key, recorded.get(key, "")) == same_result(key, value) for key, value in wanted.items())


def _is_new_and_neutral(key: str, run: LoggedRun) -> bool:
    """Whether a parameter that does not determine the result did not exist when the run was recorded."""
    return key not in run.params and key.removeprefix("train.") in NEUTRAL


def is_lost(run_id: str, config: TrainConfig) -> bool:
    """Whether a run was interrupted and cannot be resumed by this process."""
    run = LoggedRun.open(run_id)
    return not run.finished and run.status != "RUNNING" and not can_continue(run, config)


def recorded_config(run_id: str, config: TrainConfig, resumed: bool) -> TrainConfig:
    """The configuration that a run recorded; `config` if `mlflow run` has just created it (not `resumed`).

    A run stopped before it logged its configuration has the parameters that `mlflow run` logged, without a prefix.
    Raises `UserError` if the run to resume is not a training run, or its parameters cannot be read.
    """
    run, names = unfinished_run(run_id), types_of(TrainConfig).keys()
    if resumed and run.kind in NO_TRAINING_RUNS:
        raise UserError(f"--resume {run_id}: is a {run.kind}, not a training run; {NO_TRAINING_RUNS[run.kind]}")
    ours = {key: value for key, value in run.params.items() if key.startswith("train.")}
    if not ours and not resumed:
        return config
    ours = ours or {f"train.{key}": value for key, value in run.params.items() if key in names}
    if "train.data_dir" not in ours:
        raise UserError(f"--resume {run_id}: it recorded no parameters of a training run; start a new one")
    try:
        return unflatten(ours)
    except ValueError as error:
        raise UserError(f"--resume {run_id}: its parameters cannot be read ({error}); start a new run") from error
