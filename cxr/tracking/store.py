"""The tracking store: MLflow's settings, and its errors as one line."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from weakref import WeakSet

import psutil
from filelock import FileLock

from cxr.errors import MachineError, disk_full
from cxr.tracking.outage import reason_of, store_address

EXPERIMENT = "cxr"
# Without this tag, MLflow 3's UI opens an experiment on a page for language models, which shows no runs.
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds; MLflow's own limits add up to many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the summary has better links
    # A model needs far less than the project's lock file, and must not be restored from it.
    "MLFLOW_LOG_UV_FILES": "false",
}
_LOG_LEVELS = {
    "mlflow": logging.WARNING,
    "mlflow.utils.environment": logging.ERROR,
    "mlflow.store.db.utils": logging.CRITICAL,  # the traceback of each error, beside the line that we make of it
    "urllib3.connectionpool": logging.ERROR,  # a line for each of its retries
    "alembic": logging.WARNING,
}
# Write-ahead logging needs memory that all users of the file share, which files of other machines do not give.
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "fuse.")


def prepare() -> None:
    """Limit how long MLflow waits and what it logs; settings of the user stay. Make a SQLite store that is not there.

    Raises `UserError` when it cannot be made.
    """
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    for logger, level in _LOG_LEVELS.items():
        logging.getLogger(logger).setLevel(level)
    _close_databases_at_exit()
    database = _sqlite_file()
    if database and not _has_content(database):
        with store_errors(), one_at_a_time():
            if not _has_content(database):  # another process may have made it meanwhile
                _make_store(database)


@cache
def _close_databases_at_exit() -> None:
    """What Python does with objects that nobody refers to any more, which `process` does without.

    The last to close a SQLite file merges the write-ahead log into it.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Connection, Engine

    engines: WeakSet[Engine] = WeakSet()

    def remember(connection: Connection) -> None:
        engines.add(connection.engine)

    def close() -> None:
        for engine in list(engines):
            engine.dispose()

    event.listen(Engine, "engine_connect", remember)
    atexit.register(close)


def _sqlite_file() -> Path | None:
    """The SQLite file of the store in use; None for other stores, and where there is no folder for it."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    return database if database.parent.is_dir() else None  # MLflow says so in its own words


def _has_content(database: Path) -> bool:
    return database.is_file() and database.stat().st_size > 0


def _make_store(database: Path) -> None:
    """Have MLflow make its tables in another file, which becomes the store when it is complete.

    MLflow cannot open a store again that it was making when it was killed. In write-ahead mode, which SQLite remembers
    in the file, readers do not wait for a writer.
    """
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine
    from sqlalchemy import event, text

    work = database.with_name(f".{database.name}.making")  # one name, as one process at a time makes it
    _remove_database(work)
    try:
        engine = create_sqlalchemy_engine(f"sqlite:///{work}")  # type: ignore[no-untyped-call]
        # Hundreds of waits for the disk would take seconds; one at the end will do.
        event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA synchronous=OFF"))
        _initialize_tables(engine)  # type: ignore[no-untyped-call]
        if not _on_network(database.parent):
            with engine.connect() as connection:
                connection.execute(text("PRAGMA journal_mode=WAL"))
        engine.dispose()
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.replace(database)
    finally:
        _remove_database(work)


def _remove_database(path: Path) -> None:
    for end in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def _on_network(folder: Path) -> bool:
    """Whether the folder is on a file system that other machines share."""
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    kind = next((mounts[parent] for parent in [folder, *folder.parents] if parent in mounts), "")
    return kind.lower().startswith(_NETWORK_FILE_SYSTEMS)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """While this holds, no other process makes tables, experiments or champions in the same SQLite file.

    MLflow does not lock: processes that start together in an empty folder would all make its tables, and fail. The lock
    is a hidden file beside the database. A server does this for its clients.
    """
    database = _sqlite_file()
    if database is None:
        yield
        return
    with FileLock(database.with_name(f".{database.name}.lock"), is_singleton=True):  # which may be held already
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
        if "already exists" in reason:
            hint = "MLflow was stopped while it made this store; if it is new, delete the file and start again"
        raise MachineError(f"MLflow at {uri}: {reason}; {hint}") from error


@contextmanager
def store_loss_errors(run_id: str, again: str = "") -> Iterator[None]:
    """Turn the loss of the tracking store, or a full disk, during a run into one line; the run's own errors pass."""
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
    except OSError as error:
        if (full := disk_full(error)) is None:
            raise
        raise MachineError(
            f"{full}; free space there, then continue with: {again or f'cxr train --resume {run_id}'}"
        ) from error
