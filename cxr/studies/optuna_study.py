"""The Optuna study of a search: storage, queued trials, samplers, pruners, tables and figures."""

from __future__ import annotations

import errno
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from filelock import FileLock
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from cxr.config import (
    NEUTRAL,
    TrainConfig,
    TuneConfig,
    before_they_existed,
    result_parameters,
    search_range,
    without_password,
)
from cxr.errors import MachineError, UserError
from cxr.studies.patient_storage import STORAGE, PatientStorage
from cxr.tracking.outage import reason_of

RUN, PARENT, REFIT, ERROR = "mlflow_run", "mlflow_parent", "refit", "error"
PARENT_KEY = "mlflow_parent_key"
_BASE = "parameters"
MAX_RETRIES = 3
MISSED_HEARTBEATS = 6  # after which a worker is considered dead
OPEN = (TrialState.RUNNING, TrialState.WAITING)
OnStale = Callable[[optuna.Study, FrozenTrial], None]


def study_name(config: TuneConfig) -> str:
    """The study's name: `resume` names one that must exist."""
    if config.resumed:
        return config.resumed
    return f"tune-{config.train.strategy}" if config.study == "auto" else config.study


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Translate errors of an unusable storage into a `UserError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats are marked experimental
            yield
    except (SQLAlchemyError, ImportError, OSError, optuna.exceptions.StorageInternalError) as error:
        missing = isinstance(error, ImportError) and url.startswith("postgresql")
        hint = "install the driver with `uv run --extra postgres …`" if missing else "check --storage"
        raise UserError(f"--storage {without_password(url)}: {reason_of(error)}; {hint}") from error


@contextmanager
def locked(url: str) -> Iterator[None]:
    """A lock shared by all workers on all machines that use the storage; it is released when the process exits.

    Advisory locks of PostgreSQL and MySQL; for SQLite, which is used on one machine only, a file lock.
    """
    database = make_url(url).database if url.startswith("sqlite") else None
    if database:
        with _file_lock(Path(os.path.abspath(database))):
            yield
        return
    engine = create_engine(url, poolclass=NullPool)
    acquire = "select pg_advisory_lock(7283)" if engine.dialect.name == "postgresql" else "select get_lock('cxr', 600)"
    with STORAGE.ride_out(engine.connect) as connection:  # a separate connection: closing it releases the lock
        if connection.execute(text(acquire)).scalar() == 0:  # MySQL gives up after 600 s; PostgreSQL waits
            raise UserError(
                f"--storage {without_password(url)}: another worker has locked the study for ten minutes; "
                "try again later"
            )
        yield


def _file_lock(database: Path) -> FileLock:
    if not database.parent.is_dir():  # FileLock would create the folder
        raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)}: {database.parent}")
    return FileLock(f"{database}.lock")


def open_study(
    config: TuneConfig, origin: dict[str, str], make_parent: Callable[[str], str], on_stale: OnStale
) -> optuna.Study:
    """Create or continue the study, with all its trials in the queue.

    `origin` identifies the data and the weights in use; `make_parent` creates the parent run of a new study, or finds
    the one with this key that a killed worker has made, and returns its ID. Raises `UserError` for an unusable storage,
    and for a study that was started with other parameters.
    """
    name = study_name(config)
    with storage_errors(config.storage), locked(config.storage):
        storage = PatientStorage(  # under the lock, as two processes cannot create the tables concurrently
            config.storage,
            engine_kwargs=_patience(config.storage),
            heartbeat_interval=config.heartbeat,
            grace_period=MISSED_HEARTBEATS * config.heartbeat,
            heartbeat_stale_trial_callback=on_stale,
        )
        if config.resumed and name not in optuna.get_all_study_names(storage):
            raise UserError(
                f"--resume {name}: no such study in {without_password(config.storage)}; `--study {name}` starts one"
            )
        direction = StudyDirection.MINIMIZE if config.objective == "val_loss" else StudyDirection.MAXIMIZE
        study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
        study.sampler, study.pruner = _sampler(config, len(study.trials)), _pruner(config)
        _require_same(study, config, origin)
        _requeue_of_the_machine(study)
        if PARENT not in study.user_attrs:
            study.set_user_attr(PARENT, make_parent(_parent_key(study)))
        _fill_queue(study, config)
    return study


def _parent_key(study: optuna.Study) -> str:
    """What the parent run is found by, kept before it is made."""
    if PARENT_KEY not in study.user_attrs:
        study.set_user_attr(PARENT_KEY, uuid.uuid4().hex)
    return str(study.user_attrs[PARENT_KEY])


def _patience(url: str) -> dict[str, Any]:
    """How long a process waits for others that write to a SQLite file; Python's own 5 s are short on a busy machine."""
    return {"connect_args": {"timeout": 60.0}} if url.startswith("sqlite") else {}


def _parameters(config: TuneConfig) -> dict[str, str]:
    own = {f"tune.{name}": str(getattr(config, name)) for name in ("search", "objective", "seeds")}
    return {**result_parameters(config.train), **own}


def _require_same(study: optuna.Study, config: TuneConfig, origin: dict[str, str]) -> None:
    mine = _parameters(config) | {f"origin.{name}": value for name, value in origin.items()}
    theirs = study.user_attrs.get(_BASE)
    if theirs is None:
        study.set_user_attr(_BASE, mine)
        return
    # Neither lists parameters that have the value from before they existed; others that are missing had their defaults.
    before = {k: v for k, v in before_they_existed().items() if k.removeprefix("train.") not in NEUTRAL}
    mine = before | mine
    theirs = {**mine, **_parameters(TuneConfig()), **before, **theirs}
    other = [f"{key.split('.')[1]} was {theirs.get(key)}" for key, value in mine.items() if theirs.get(key) != value]
    if other:
        raise UserError(
            f"study {study.study_name} was started with other parameters: {', '.join(other)}; use another --study"
        )


def slots(study: optuna.Study) -> list[FrozenTrial]:
    """The latest attempt of each trial: trials lost by a dead worker are represented by their retry."""
    trials = study.get_trials(deepcopy=False)
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
    return [trial for trial in trials if trial.number not in retried]


def _requeue_of_the_machine(study: optuna.Study) -> None:
    """Queue again what failed for a reason that is not in its parameters, and could not be queued then: a full disk."""
    for trial in slots(study):
        if trial.state == TrialState.FAIL and trial.user_attrs.get(ERROR, "").startswith(f"{MachineError.__name__}: "):
            requeue(study, trial)


def _fill_queue(study: optuna.Study, config: TuneConfig) -> None:
    """Queue trials up to `trials`: the first uses the default values, the others are sampled."""
    for number in range(len(slots(study)), config.trials):
        defaults = {name: getattr(config.train, name) for name in config.searched()}
        study.enqueue_trial(defaults if number == 0 else {})


def _sampler(config: TuneConfig, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler, seeded by the seed of the study; workers that join later get other seeds to sample other points."""
    seed = config.train.seed if trials == 0 else (config.train.seed + 7919 * trials + os.getpid()) % 2**31
    if config.sampler == "TPESampler":
        return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        sampler: optuna.samplers.BaseSampler = getattr(optuna.samplers, config.sampler)(seed=seed)
    return sampler


def _pruner(config: TuneConfig) -> optuna.pruners.BasePruner:
    epochs = config.train.epochs * len(config.train.phases)
    options: dict[str, dict[str, Any]] = {
        "MedianPruner": {"n_startup_trials": 4, "n_warmup_steps": 1},
        "HyperbandPruner": {"min_resource": 1, "max_resource": epochs if config.seeds == 1 else config.seeds},
    }
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        pruner: optuna.pruners.BasePruner = getattr(optuna.pruners, config.pruner)(**options.get(config.pruner, {}))
    return pruner


def suggest(trial: Trial, config: TuneConfig) -> TrainConfig:
    """The suggested parameters of a trial. Ranges are widened to include the default."""
    chosen: dict[str, Any] = {}
    for name in config.searched():
        spec, default = search_range(name), getattr(config.train, name)
        assert spec.search is not None
        low, high = min(spec.search[0], default), max(spec.search[1], default)
        if isinstance(default, int):
            chosen[name] = trial.suggest_int(name, int(low), int(high), log=spec.log)
        else:
            chosen[name] = trial.suggest_float(name, low, high, log=spec.log)
    return trial_config(config, chosen)


def trial_config(config: TuneConfig, params: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a trial with these parameters."""
    return replace(config.train, **params)


def requeue(study: optuna.Study, trial: FrozenTrial, limit: int | None = None) -> None:
    """Queue an interrupted trial again, unless it was already retried `limit` times."""
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        RetryHeartbeatStaleTrialCallback(max_retry=limit)(study, trial)


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """A row per attempt: trial, state, value, parameters, number of reports, run, error."""
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name,
            "value": trial.value if trial.state == TrialState.COMPLETE else None,
            **trial.params,
            "reports": len(trial.intermediate_values),
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "run": trial.user_attrs.get(RUN, ""),
            "error": trial.user_attrs.get(ERROR, ""),
            "retry_of": trial.system_attrs.get("failed_trial"),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    return pd.DataFrame(rows)


def study_figures(study: optuna.Study, objective: str) -> dict[str, Figure]:
    """Optuna's figures, those for which the study has enough trials."""
    import optuna.visualization.matplotlib as draw

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    names = list(study.best_params) if complete else []
    kinds: dict[str, Callable[[], Any]] = {}
    if complete:
        kinds["history"] = lambda: draw.plot_optimization_history(study, target_name=objective)
        kinds["intermediate_values"] = lambda: draw.plot_intermediate_values(study)
        kinds["slice"] = lambda: draw.plot_slice(study, target_name=objective)
    if len(complete) > 1 and len(names) > 1:
        if len({trial.value for trial in complete}) > 1:  # where nothing varies, older versions of Optuna raise
            kinds["importances"] = lambda: draw.plot_param_importances(study, target_name=objective)
        kinds["parallel_coordinate"] = lambda: draw.plot_parallel_coordinate(study, target_name=objective)
        kinds["contour"] = lambda: draw.plot_contour(study, params=names[:2], target_name=objective)
    with warnings.catch_warnings(action="ignore"), plt.style.context("default"):
        figures = {kind: _figure_of(make()) for kind, make in kinds.items()}
    if objective == "val_loss" and complete:
        figures["intermediate_values"].axes[0].set_yscale("log")  # a diverged trial would dominate a linear scale
    return figures


def _figure_of(axes: Any) -> Figure:
    """The figure of axes from Optuna, detached from pyplot and enlarged."""
    figure: Figure = (axes.ravel()[0] if hasattr(axes, "ravel") else axes).figure
    plt.close(figure)
    figure.set_size_inches(9.6, 6.0)
    figure.set_dpi(110)
    return figure
