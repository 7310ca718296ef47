"""The tracking store: MLflow's settings, and its errors as one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from cxr.errors import MachineError
from cxr.tracking.outage import reason_of, store_address

EXPERIMENT = "cxr"
# Without this tag, MLflow 3's UI opens an experiment on a page for language models, which shows no runs.
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds; MLflow's own limits add up to many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A model needs far less than the project's lock file, and must not be restored from it.
    "MLFLOW_LOG_UV_FILES": "false",
}
_LOG_LEVELS = {
    "mlflow": logging.WARNING,
    "mlflow.utils.environment": logging.ERROR,
    "mlflow.store.db.utils": logging.CRITICAL,  # a traceback for each call that is not answered
    "urllib3.connectionpool": logging.ERROR,  # a line for each of its retries
    "alembic": logging.WARNING,
}


def prepare() -> None:
    """Limit how long MLflow waits and what it logs; settings of the user stay."""
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    for logger, level in _LOG_LEVELS.items():
        logging.getLogger(logger).setLevel(level)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """While this holds, no other process makes tables, experiments or champions in the same SQLite file.

    MLflow does not lock: processes that start together in an empty folder would all make its tables, and fail. The lock
    is a hidden file beside the database. A server does this for its clients.
    """
    import mlflow

    uri = mlflow.get_tracking_uri()
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    if not database.parent.is_dir():  # MLflow says so in its own words
        yield
        return
    with FileLock(database.with_name(f".{database.name}.lock")):
        yield


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn the errors of a tracking store that cannot be used into one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, OSError, ImportError, SQLAlchemyError) as error:
        uri, reason = store_address(), reason_of(error)
        hint = "check MLFLOW_TRACKING_URI"
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            hint += ", which `mlflow run` wants with an absolute path (sqlite:////…)"
        raise MachineError(f"MLflow at {uri}: {reason}; {hint}") from error


@contextmanager
def store_loss_errors(run_id: str, again: str = "") -> Iterator[None]:
    """Turn the loss of the tracking store during a run into one line; the run's own errors pass."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        raise MachineError(
            f"MLflow at {store_address()} failed during run {run_id}: {reason_of(error)}; "
            f"when it answers again, continue with: {again or f'cxr train --resume {run_id}'}"
        ) from error
