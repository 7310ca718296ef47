"""Runs, metrics and artifacts in MLflow, and a tracker that keeps nothing, for tests and bare use."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import pandas as pd
from matplotlib.figure import Figure

from cxr.config import without_password
from cxr.errors import InUseError, MachineError, Pruned, Stopped, UserError

EXPERIMENT = "cxr"
ERROR, OUTCOME, HOST = "cxr.error", "cxr.outcome", "cxr.host"
# Without this tag, MLflow 3's UI opens an experiment on a page for language models, which shows no runs.
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")


_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds; MLflow's own limits add up to many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A model needs far less than the project's lock file, and must not be restored from it.
    "MLFLOW_LOG_UV_FILES": "false",
}
_LOG_LEVELS = {"mlflow": logging.WARNING, "mlflow.utils.environment": logging.ERROR, "alembic": logging.WARNING}


class Tracker(Protocol):
    """What the pipeline tells of a run."""

    run_id: str

    def params(self, values: Mapping[str, str]) -> None:
        """Log parameters, all at once."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def metrics(self, values: Mapping[str, float], step: int | None = None, model_id: str | None = None) -> None:
        """Log metrics in one call, tied to a logged model if one is named."""

    def figure(self, figure: Figure, path: str) -> None:
        """Keep a figure as an artifact."""

    def text(self, text: str, path: str) -> None:
        """Keep a text as an artifact."""

    def table(self, table: pd.DataFrame, path: str) -> None:
        """Keep a table as a CSV artifact, floats in full precision."""

    def dataset(self, table: pd.DataFrame, source: str, name: str, context: str) -> None:
        """Note which data the run used, and for what."""

    def recorded_tags(self) -> Mapping[str, str]:
        """The tags that the run had when it was opened; empty for a new one."""

    def logged(self, metric: str) -> Mapping[int, float]:
        """Step -> value of a metric that was logged before the run was opened: empty for a new one."""

    def count(self, tags: Mapping[str, str]) -> int:
        """How many other runs of the store have these tags."""

    def where(self) -> list[str]:
        """Lines that tell a person where to look."""


class NullTracker:
    """Forgets parameters and artifacts, and remembers metrics and tags, so that tests and scripts can read them."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id or f"untracked-{uuid.uuid4().hex[:12]}"
        self.logged_params: dict[str, str] = {}
        self.logged_tags: dict[str, str] = {}
        self.logged_metrics: list[tuple[int | None, dict[str, float]]] = []
        self.artifacts: list[str] = []

    def params(self, values: Mapping[str, str]) -> None:
        """Remembered."""
        self.logged_params |= values

    def tags(self, values: Mapping[str, str]) -> None:
        """Remembered."""
        self.logged_tags |= values

    def metrics(self, values: Mapping[str, float], step: int | None = None, model_id: str | None = None) -> None:
        """Remembered with its step."""
        self.logged_metrics.append((step, dict(values)))

    def figure(self, figure: Figure, path: str) -> None:
        """Only its path is remembered."""
        self.artifacts.append(path)

    def text(self, text: str, path: str) -> None:
        """Only its path is remembered."""
        self.artifacts.append(path)

    def table(self, table: pd.DataFrame, path: str) -> None:
        """Only its path is remembered."""
        self.artifacts.append(path)

    def dataset(self, table: pd.DataFrame, source: str, name: str, context: str) -> None:
        """Forgotten."""

    def recorded_tags(self) -> Mapping[str, str]:
        """Nothing."""
        return {}

    def logged(self, metric: str) -> Mapping[int, float]:
        """Nothing."""
        return {}

    def count(self, tags: Mapping[str, str]) -> int:
        """None."""
        return 0

    def where(self) -> list[str]:
        """Nowhere."""
        return ["not tracked"]


class MlflowTracker:
    """A run in MLflow, the active one or a parent of it."""

    def __init__(self, run: Any):
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self._recorded_tags = dict(run.data.tags)
        self._metrics = set(run.data.metrics)

    def params(self, values: Mapping[str, str]) -> None:
        """One call for all."""
        import mlflow

        mlflow.log_params(dict(values), run_id=self.run_id)

    def tags(self, values: Mapping[str, str]) -> None:
        """One call for all."""
        import mlflow

        tags = [mlflow.entities.RunTag(key, value) for key, value in values.items()]
        mlflow.MlflowClient().log_batch(self.run_id, tags=tags)

    def metrics(self, values: Mapping[str, float], step: int | None = None, model_id: str | None = None) -> None:
        """One call for all: one by one they cost 6 ms each with SQLite."""
        import mlflow

        mlflow.log_metrics(dict(values), step=step, run_id=self.run_id, model_id=model_id)

    def figure(self, figure: Figure, path: str) -> None:
        """As PNG at the figure's own resolution."""
        with _artifact(path, self.run_id) as file:
            figure.savefig(file)

    def text(self, text: str, path: str) -> None:
        """As it is."""
        import mlflow

        mlflow.log_text(text, path, run_id=self.run_id)

    def table(self, table: pd.DataFrame, path: str) -> None:
        """As CSV."""
        with _artifact(path, self.run_id) as file:
            table.to_csv(file, index=False)

    def dataset(self, table: pd.DataFrame, source: str, name: str, context: str) -> None:
        """As an MLflow dataset with schema, digest and source."""
        import mlflow

        with warnings.catch_warnings():
            # The source is a folder, whichever of its two classes for that MLflow takes; no label is ever missing.
            warnings.filterwarnings("ignore", "The specified dataset source can be interpreted", UserWarning)
            warnings.filterwarnings("ignore", "Hint: Inferred schema contains integer", UserWarning)
            data = mlflow.data.from_pandas(table, source=source, name=name, targets="label")  # type: ignore[attr-defined]
            mlflow.log_input(data, context=context)

    def recorded_tags(self) -> Mapping[str, str]:
        """As the store had them."""
        return self._recorded_tags

    def logged(self, metric: str) -> Mapping[int, float]:
        """As the store had it."""
        return metric_history(self.run_id, metric) if metric in self._metrics else {}

    def count(self, tags: Mapping[str, str]) -> int:
        """In all experiments, whatever became of the runs."""
        import mlflow

        chosen = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = mlflow.search_runs(
            search_all_experiments=True, filter_string=chosen, output_format="list", max_results=50_000
        )
        return sum(run.info.run_id != self.run_id for run in found)

    def where(self) -> list[str]:
        """The command that opens the UI and the pages that matter."""
        import mlflow

        uri = without_password(mlflow.get_tracking_uri())
        remote = uri.startswith("http")
        base = uri.rstrip("/") if remote else "http://127.0.0.1:5000"
        experiment = f"{base}/#/experiments/{self.experiment_id}/runs"
        lines = [] if remote else [f"mlflow ui --backend-store-uri {uri}"]
        view = "?workflowType=machine_learning"  # else the UI shows its pages for language models
        return [*lines, f"{experiment}/{self.run_id}{view}", f"{experiment}{view}"]


@contextmanager
def _artifact(path: str, run_id: str) -> Iterator[Path]:
    """A temporary file of that name, logged as an artifact in that folder when the block ends well."""
    import mlflow

    folder, _, name = path.rpartition("/")
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / name
        yield file
        mlflow.log_artifact(str(file), folder or None, run_id)


def prepare() -> None:
    """Bound MLflow's waits and quiet its logs; what the user has set stays."""
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    for logger, level in _LOG_LEVELS.items():
        logging.getLogger(logger).setLevel(level)


def existing_run(resume: str, child: bool = False) -> str | None:
    """The id of the run to go on with: the one to resume, else the one that `mlflow run` opened, else None.

    A `child` is never the one that `mlflow run` opened: that is its parent, or its parent's helper.

    Raises `UserError` when both are there and differ.
    """
    opened = None if child else os.environ.get("MLFLOW_RUN_ID")
    if resume == "none":
        return opened
    if opened not in (None, resume):
        raise UserError(f"--resume {resume}: `mlflow run` has opened another run; use `mlflow run . --run-id {resume}`")
    return resume


def recorded(run_id: str) -> dict[str, str]:
    """Parameters and tags of a run that is to be gone on with.

    Raises `UserError` when it is not there, finished already, or running on another machine.
    """
    import mlflow

    prepare()
    with explained():
        run = mlflow.get_run(run_id)
        if run.data.tags.get(OUTCOME) == "finished" and run.info.status != "FINISHED":
            mlflow.MlflowClient().set_terminated(run_id, "FINISHED")  # it was killed on its last step
    if has_finished(run):
        raise UserError(f"run {run_id} is finished: there is nothing to resume; start a new one")
    require_not_elsewhere(run)
    return {**run.data.params, **run.data.tags}


def require_not_elsewhere(run: Any) -> None:
    """Raise `InUseError` when the run is RUNNING on another machine, whose lock files this one does not see."""
    host, run_id = run.data.tags.get(HOST), run.info.run_id
    if run.info.status == "RUNNING" and host not in (None, socket.gethostname()):
        raise InUseError(
            f"run {run_id} is running on {host}; wait for it. If that machine is gone, end the run first: "
            f"python -c \"import mlflow; mlflow.MlflowClient().set_terminated('{run_id}', 'KILLED')\""
        )


def has_finished(run: Any) -> bool:
    """Also when it was killed between its last word and its end."""
    return bool(run.info.status == "FINISHED" or run.data.tags.get(OUTCOME) == "finished")


@contextmanager
def explained() -> Iterator[None]:
    """Turn what a tracking store raises when it cannot be used into one line."""
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, OSError, ImportError, SQLAlchemyError) as error:
        uri, reason = without_password(mlflow.get_tracking_uri()), str(error).splitlines()[0][:200]
        hint = "check MLFLOW_TRACKING_URI"
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            hint += ", which `mlflow run` wants with an absolute path (sqlite:////…)"
        raise MachineError(f"MLflow at {uri}: {reason}; {hint}") from error


@contextmanager
def open_run(
    name: str,
    experiment: str = EXPERIMENT,
    run_id: str | None = None,
    parent: str | None = None,
    stops: bool = True,
    again: str = "",
) -> Iterator[MlflowTracker]:
    """The run `run_id`, taken up again, or a new one in `experiment`, as a child of the run `parent` if there is one.

    With `stops`, SIGTERM and Ctrl-C end it; else the caller handles them. `again` says how to go on with it, should the
    store be lost, if not by `cxr train --resume`.

    It ends FINISHED, FAILED (with the reason as tag `cxr.error`) or KILLED (Ctrl-C, SIGTERM), never RUNNING. (`mlflow
    run` 3.17 then writes FAILED over KILLED: it compares the name of a status with numbers. The tag tells them apart.)
    Raises `UserError` when the tracking store cannot be used.
    """
    import mlflow

    prepare()
    with stops_once() if stops else nullcontext():
        try:
            with explained():
                run = _start(name, experiment, run_id, parent)
            with store_errors_explained(run.info.run_id, again):
                yield MlflowTracker(run)
                mlflow.set_tag(OUTCOME, "finished")
        except (KeyboardInterrupt, Stopped):
            _end("KILLED", "stopped by the user")
            raise
        except Pruned as error:
            _end("KILLED", str(error))
            raise
        except BaseException as error:
            _end("FAILED", f"{type(error).__name__}: {error}")
            raise
        mlflow.end_run("FINISHED")


@contextmanager
def store_errors_explained(run_id: str, again: str = "") -> Iterator[None]:
    """Turn the loss of the tracking store in mid-run into one line; the run's own errors pass."""
    import mlflow
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise MachineError(
            f"MLflow at {without_password(mlflow.get_tracking_uri())} failed during run {run_id}: {reason}; "
            f"when it answers again, go on with: {again or f'cxr train --resume {run_id}'}"
        ) from error


def _start(name: str, experiment: str, run_id: str | None, parent: str | None) -> Any:
    import mlflow

    if parent and not run_id:
        mlflow.set_experiment(experiment_id=mlflow.get_run(parent).info.experiment_id)
    elif not run_id:
        choose_experiment(experiment)
    with _without_opened_run(parent):
        run = mlflow.start_run(
            run_id=run_id, run_name=None if run_id else name, parent_run_id=parent, log_system_metrics=True
        )
    mlflow.set_tag(HOST, socket.gethostname())
    if ERROR in run.data.tags:  # of the attempt that is resumed
        mlflow.delete_tag(ERROR)
    if is_generated(run.info.run_name or ""):
        mlflow.set_tag("mlflow.runName", name)
    mlflow.MlflowClient().set_experiment_tag(run.info.experiment_id, *EXPERIMENT_KIND)
    return run


def choose_experiment(experiment: str = EXPERIMENT) -> None:
    """Make the experiment active that `mlflow run` or the environment names, else `experiment`."""
    import mlflow

    if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        mlflow.set_experiment(experiment_id=experiment_id)
    else:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", experiment))


@contextmanager
def _without_opened_run(parent: str | None) -> Iterator[None]:
    """`start_run` would take up the run that `mlflow run` opened; a child is not that one."""
    opened = os.environ.pop("MLFLOW_RUN_ID", None) if parent else None
    try:
        yield
    finally:
        if opened:
            os.environ["MLFLOW_RUN_ID"] = opened


def is_generated(name: str) -> bool:
    """Whether MLflow made the name up (`bold-crane-123`); one that a person chose is kept."""
    from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

    adjective, _, rest = name.partition("-")
    noun, _, number = rest.partition("-")
    return adjective in _GENERATOR_PREDICATES and noun in _GENERATOR_NOUNS and number.isdigit()


def note_error(run_id: str, reason: str) -> None:
    """Tag a run that failed before it was taken up: `mlflow run` ends it FAILED, and would not say why."""
    import mlflow

    prepare()
    with suppress(UserError), explained():
        mlflow.MlflowClient().set_tag(run_id, ERROR, reason[:5000])


def _end(status: str, reason: str) -> None:
    """End the active run, if it was opened at all, whatever else fails or is pressed meanwhile."""
    import mlflow

    with _signals_ignored():
        if (run := mlflow.active_run()) is None:
            return
        try:
            note_error(run.info.run_id, reason)
        finally:
            _end_active(run.info.run_id, status)


def _end_active(run_id: str, status: str) -> None:
    """A store that is gone cannot be told; that must not hide what ended the run."""
    import mlflow

    try:
        with explained():
            mlflow.end_run(status)
    except UserError:
        warnings.warn(f"run {run_id} could not be ended in the store, which still shows it RUNNING", stacklevel=2)


@contextmanager
def handlers(chosen: Mapping[int, Any]) -> Iterator[None]:
    """Signal handlers for a block; only the main thread may set them, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in chosen.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stops_once() -> AbstractContextManager[None]:
    """Within the block, SIGTERM unwinds the stack like Ctrl-C, and what follows the first of either is ignored.

    On Ctrl-C, `mlflow run` sends SIGTERM after the terminal's SIGINT: the second must not break off the ending.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped("SIGTERM")

    return handlers({signal.SIGTERM: stop, signal.SIGINT: stop})


def _signals_ignored() -> AbstractContextManager[None]:
    """A second Ctrl-C must not keep a run from being ended."""
    return handlers({signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: signal.SIG_IGN})


def load_table(run_id: str, path: str) -> pd.DataFrame:
    """A table (CSV) that a run logged. Raises `UserError` when it is not there."""
    import mlflow

    with explained():
        address = f"{mlflow.get_run(run_id).info.artifact_uri}/{path}"
        return pd.read_csv(StringIO(mlflow.artifacts.load_text(address)))


def metric_history(run_id: str, metric: str) -> dict[int, float]:
    """Step -> value of a run's metric; of a step logged more than once, the last."""
    import mlflow

    with explained():
        logged = mlflow.MlflowClient().get_metric_history(run_id, metric)
    return {each.step: each.value for each in sorted(logged, key=lambda each: (each.step, each.timestamp))}


def source_run(uri: str) -> str | None:
    """The id of the run that logged a model; None where the store does not say (a plain folder)."""
    import mlflow

    prepare()
    try:
        with explained():
            found: str | None = mlflow.models.get_model_info(uri).run_id
    except UserError:
        return None
    return found


def git_commit() -> str:
    """The commit of the code in use, `-dirty` with uncommitted changes; `unknown` outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
