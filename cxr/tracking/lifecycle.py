"""Runs, metrics and artifacts in MLflow, and a tracker that keeps nothing, for tests and bare use."""

from __future__ import annotations

import os
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from cxr.errors import Pruned, Stopped, UserError
from cxr.tracking.outage import OUTAGE, is_outage
from cxr.tracking.reading import FINISHED, LoggedRun, Tag
from cxr.tracking.signals import _signals_ignored, stop_shown, stops_once
from cxr.tracking.store import (
    EXPERIMENT,
    EXPERIMENT_KIND,
    one_at_a_time,
    prepare,
    store_errors,
    store_loss_errors,
)
from cxr.tracking.system_metrics import system_metrics
from cxr.tracking.tracker import MlflowTracker


def existing_run(resume: str | None, child: bool = False) -> str | None:
    """The id of the run to continue: the one to resume, else the one that `mlflow run` opened, else None.

    A `child` is never the one that `mlflow run` opened: that is its parent, or a worker of its parent.

    Raises `UserError` when both are there and differ.
    """
    opened = None if child else os.environ.get("MLFLOW_RUN_ID")
    if resume is None:
        return opened
    if opened not in (None, resume):
        raise UserError(f"--resume {resume}: `mlflow run` has opened another run; use `mlflow run . --run-id {resume}`")
    return resume


@contextmanager
def open_run(
    name: str,
    run_id: str | None = None,
    parent: str | None = None,
    stops: bool = True,
    again: str = "",
    outbox: Callable[[str], Path] | None = None,
) -> Iterator[MlflowTracker]:
    """The run `run_id`, continued, or a new one, as a child of the run `parent` if given.

    With `stops`, SIGTERM and Ctrl-C end it; otherwise the caller handles them. `again` says how to continue it if the
    store is lost, when not by `cxr train --resume`. `outbox` gives the folder, for a run ID, of what is logged and not
    delivered; what an earlier attempt has left there is delivered first.

    It ends FINISHED, FAILED (with the reason as tag `cxr.error`) or KILLED (Ctrl-C, SIGTERM), never RUNNING. (`mlflow
    run` 3.17 then writes FAILED over KILLED: it compares the name of a status with numbers. The tag tells them apart.)
    Raises `UserError` when the tracking store cannot be used.
    """
    import mlflow

    prepare()
    with OUTAGE.restored(), stops_once() if stops else nullcontext(list[int]()) as heard:
        try:
            with store_errors():
                run = _start(name, run_id, parent)
                tracker = MlflowTracker(run, outbox and outbox(run.info.run_id))
                OUTAGE.ride_out(tracker.deliver_left)
            with stop_shown(heard), store_loss_errors(run.info.run_id, again), closing(tracker):
                with system_metrics(tracker, resumed=run_id is not None):
                    yield tracker
                tracker.drain()
                OUTAGE.ride_out(lambda: mlflow.set_tag(Tag.OUTCOME, FINISHED))
        except (KeyboardInterrupt, Stopped):
            _end("KILLED", "stopped by the user")
            raise
        except Pruned as error:
            _end("KILLED", str(error))
            raise
        except BaseException as error:
            _end("FAILED", f"{type(error).__name__}: {error}")
            raise
        with store_loss_errors(run.info.run_id, again):
            _finish(run.info.run_id)


def _finish(run_id: str) -> None:
    """End the active run. MLflow forgets that it is active before it asks the store, so that is asked first."""
    import mlflow

    OUTAGE.ride_out(lambda: mlflow.MlflowClient().set_terminated(run_id, "FINISHED"))
    try:
        mlflow.end_run("FINISHED")
    except Exception as error:
        if not is_outage(error):  # what it has to say has been said
            raise


def _start(name: str, run_id: str | None, parent: str | None) -> Any:
    """Open the run; each step may be repeated, and waits for the store as a parent at work allows."""
    if not run_id:
        OUTAGE.ride_out(lambda: _choose_experiment_of(parent))
    run = OUTAGE.ride_out(lambda: _opened(name, run_id, parent))
    OUTAGE.ride_out(lambda: _mark(run, name))
    return run


def _choose_experiment_of(parent: str | None) -> None:
    import mlflow

    if parent:
        mlflow.set_experiment(experiment_id=LoggedRun.open(parent).experiment_id)
        return
    choose_experiment()
    end_killed(str(mlflow.tracking.fluent._get_experiment_id()))


def _opened(name: str, run_id: str | None, parent: str | None) -> Any:
    import mlflow

    at_work: dict[str, str] = {Tag.HOST: socket.gethostname(), Tag.PROCESS: this_process()}
    with _without_opened_run(parent):
        return mlflow.start_run(
            run_id=run_id,
            run_name=None if run_id else name,
            parent_run_id=parent,
            log_system_metrics=False,
            tags=at_work,  # in the same call: a run that is killed in the next moment can be told
        )


def _mark(run: Any, name: str) -> None:
    """Nothing of an earlier attempt stays, nor a made-up name."""
    import mlflow

    if Tag.ERROR in mlflow.get_run(run.info.run_id).data.tags:
        mlflow.delete_tag(Tag.ERROR)
    if is_generated(run.info.run_name or ""):
        mlflow.set_tag(Tag.RUN_NAME, name)
    mlflow.MlflowClient().set_experiment_tag(run.info.experiment_id, *EXPERIMENT_KIND)


def this_process() -> str:
    """`PID SECONDS SPACE` of this process, which tell it from all others of this machine: when it started, and the
    space in which process IDs are counted, as containers have their own.
    """
    space = Path("/proc/self/ns/pid")
    own = os.readlink(space) if space.is_symlink() else "machine"
    return f"{os.getpid()} {psutil.Process().create_time():.0f} {own}"


def _is_gone(process: str) -> bool:
    """Whether a process of this machine has ended; of other containers, and of earlier versions, this is not known."""
    match process.split(), this_process().split()[2]:
        case (pid, started, space), own if space == own:
            try:
                return bool(psutil.Process(int(pid)).create_time() > float(started) + 60)  # the clock may have been set
            except psutil.NoSuchProcess:
                return True
    return False


def was_killed(tags: Mapping[str, str]) -> bool:
    """Whether the process that a run with these tags was at work in has ended; it was one of this machine."""
    return tags.get(Tag.HOST) == socket.gethostname() and _is_gone(tags.get(Tag.PROCESS, ""))


def end_killed(experiment_id: str) -> None:
    """End the runs of the experiment that the store shows RUNNING though their process on this machine was killed.

    They can be resumed as before.
    """
    import mlflow

    chosen = f"attributes.status = 'RUNNING' and tags.`{Tag.HOST}` = '{socket.gethostname()}'"
    client = mlflow.MlflowClient()
    for run in client.search_runs([experiment_id], chosen):
        if was_killed(run.data.tags):
            client.set_tag(run.info.run_id, Tag.ERROR, "its process was killed")
            client.set_terminated(run.info.run_id, "KILLED")


def choose_experiment() -> None:
    """Make the experiment active that `mlflow run` or the environment names, else `EXPERIMENT`."""
    import mlflow

    with one_at_a_time():
        if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            mlflow.set_experiment(experiment_id=experiment_id)
        else:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))


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
    with suppress(UserError), store_errors():
        mlflow.MlflowClient().set_tag(run_id, Tag.ERROR, reason[:5000])


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
    """End the active run. A store that cannot be reached must not hide the error that ended the run."""
    import mlflow

    try:
        with store_errors():
            mlflow.end_run(status)
    except UserError:
        warnings.warn(f"run {run_id} could not be ended in the store, which still shows it RUNNING", stacklevel=2)


def git_commit() -> str:
    """The commit of the code in use, `-dirty` with uncommitted changes; `unknown` outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
