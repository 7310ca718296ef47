"""Whether an interrupted run can go on, and with which configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cxr.config import TrainConfig, flatten, unflatten
from cxr.errors import UserError
from cxr.parameters import types_of
from cxr.storage import checkpoint_folder
from cxr.tracking.reading import has_finished, recorded
from cxr.tracking.store import explained
from cxr.training.checkpoint import LAST

if TYPE_CHECKING:
    from mlflow.entities import Run

# The tag `cxr.kind` of runs that have a training run's parameters and are none -> what to do instead.
NO_TRAINING_RUNS = {
    "search": "give its `cxr tune` command again",
    "trial": "give the `cxr tune` command of its search again",
    "comparison": "give its `cxr compare` command again",
    "crossval": "give its `cxr crossval` command again",
    "evaluation": "give its `cxr evaluate` command again",
}


def can_go_on(run: Run, config: TrainConfig) -> bool:
    """Whether an interrupted run has these parameters, and the checkpoint of its epochs is here."""
    folder = checkpoint_folder(config, run.info.run_id)
    same = all(run.data.params.get(key) == value for key, value in flatten(config).items())
    return same and ("val_loss" not in run.data.metrics or (folder / LAST).exists())


def is_lost(run_id: str, config: TrainConfig) -> bool:
    """Whether a run was broken off and cannot be gone on with by this process."""
    import mlflow

    with explained():
        run = mlflow.get_run(run_id)
    return not has_finished(run) and run.info.status != "RUNNING" and not can_go_on(run, config)


def recorded_config(run_id: str, config: TrainConfig, resumed: bool) -> TrainConfig:
    """The configuration that a run recorded; `config` for one that `mlflow run` has just opened, not `resumed`.

    A run that was stopped before it recorded ours has the parameters that `mlflow run` logged, under plain names.
    Raises `UserError` for a run to resume that is no training run, or whose parameters cannot be read.
    """
    known, names = recorded(run_id), types_of(TrainConfig).keys()
    kind = known.get("cxr.kind", "")
    if resumed and kind in NO_TRAINING_RUNS:
        raise UserError(f"--resume {run_id}: is a {kind}, not a training run; {NO_TRAINING_RUNS[kind]}")
    ours = {key: value for key, value in known.items() if key.startswith("train.")}
    if not ours and not resumed:
        return config
    ours = ours or {f"train.{key}": value for key, value in known.items() if key in names}
    if "train.data_dir" not in ours:
        raise UserError(f"--resume {run_id}: it recorded no parameters of a training run; start a new one")
    try:
        return unflatten(ours)
    except ValueError as error:
        raise UserError(f"--resume {run_id}: its parameters cannot be read ({error}); start a new run") from error
