"""A parent run and its children: a search and its trials, a comparison and its runs, folds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cxr.errors import Stopped, UserError
from cxr.tracking.lifecycle import choose_experiment, end_killed, is_generated
from cxr.tracking.outage import OUTAGE, waits
from cxr.tracking.reading import FINISHED, Artifact, LoggedRun, Tag
from cxr.tracking.signals import stops_once
from cxr.tracking.store import EXPERIMENT_KIND, prepare, store_errors, store_loss_errors
from cxr.tracking.tracker import MlflowTracker

AGAIN = "the same command"


def open_parent(name: str, tags: Mapping[str, str], params: Mapping[str, str], made: str | None = None) -> str:
    """The id of a run that is to have children: `made` by an earlier process, which may have been killed before it
    logged the parameters, else the one that `mlflow run` opened, else a new one, SCHEDULED."""
    import mlflow

    prepare()
    with store_errors():
        client = mlflow.MlflowClient()
        if made:
            if not client.get_run(made).data.params:
                _log_params(made, params)
            return made
        if opened := os.environ.get("MLFLOW_RUN_ID"):
            generated = is_generated(client.get_run(opened).info.run_name or "")
            named: dict[str, str] = {Tag.RUN_NAME: name} if generated else {}
            for key, value in {**tags, **named}.items():
                client.set_tag(opened, key, value)
            _log_params(opened, params)
            return opened
        choose_experiment()
        experiment_id = mlflow.tracking.fluent._get_experiment_id()
        client.set_experiment_tag(str(experiment_id), *EXPERIMENT_KIND)
        return _schedule(str(experiment_id), name, tags, params)


def _schedule(experiment_id: str, name: str, tags: Mapping[str, str], params: Mapping[str, str]) -> str:
    """The id of a new run that is not RUNNING before somebody takes it up."""
    import mlflow

    client = mlflow.MlflowClient()
    run_id = str(client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id)
    client.update_run(run_id, status="SCHEDULED")
    _log_params(run_id, params)
    return run_id


def _log_params(run_id: str, params: Mapping[str, str]) -> None:
    import mlflow
    from mlflow.entities import Param

    mlflow.MlflowClient().log_batch(run_id, params=[Param(key, value) for key, value in params.items()])


def unfinished_parent(tag: str, value: str) -> str | None:
    """The id of the latest run with that tag that did not end FINISHED, to be gone on with; None if there is none.

    Raises `UserError` when it is running on another machine.
    """
    import mlflow

    prepare()
    with store_errors():
        found = mlflow.search_runs(
            search_all_experiments=True,
            filter_string=f"tags.`{tag}` = '{value}' and attributes.status != 'FINISHED'",
            order_by=["start_time DESC"],
            output_format="list",
            max_results=1,
        )
    for run in found:
        LoggedRun.of(run).require_not_elsewhere()
    return str(found[0].info.run_id) if found else None


def join_parent(parent: str) -> MlflowTracker:
    """A tracker of the parent run, which is RUNNING from now on.

    Another run that `mlflow run` opened for this process becomes its child. Raises `UserError` when it is not there.
    """
    import mlflow

    prepare()
    opened = os.environ.get("MLFLOW_RUN_ID")
    with store_errors():
        client = mlflow.MlflowClient()
        run = client.get_run(parent)
        client.update_run(parent, status="RUNNING")
        if opened and opened != parent:
            client.set_tag(opened, Tag.PARENT, parent)
            client.set_tag(opened, Tag.RUN_NAME, f"worker-{socket.gethostname()}-{os.getpid()}")
        if Tag.ERROR in run.data.tags:
            client.delete_tag(parent, Tag.ERROR)
        end_killed(run.info.experiment_id)  # such as children of an earlier attempt
    return MlflowTracker(run)


def log_once(parent: MlflowTracker, values: Mapping[str, float]) -> None:
    """Log metrics that the same command, killed after it had logged them, would log again."""
    if new := {name: value for name, value in values.items() if not parent.logged(name)}:
        parent.metrics(new)


@contextmanager
def ending(parent: str) -> Iterator[None]:
    """The parent ends FINISHED with the block, KILLED when it was stopped, FAILED with the reason otherwise."""
    with OUTAGE.restored(), stops_once():  # to the last: SIGTERM would otherwise leave it RUNNING
        try:
            with store_loss_errors(parent, AGAIN):
                yield
            OUTAGE.ride_out(lambda: end(parent, "FINISHED"))
        except (KeyboardInterrupt, Stopped):
            end(parent, "KILLED", "stopped by the user")
            raise
        except BaseException as error:
            end(parent, "FAILED", f"{type(error).__name__}: {error}")
            raise


def end(run_id: str, status: str, reason: str = "") -> None:
    """End a run that is not the active one; a store that cannot be reached is ignored."""
    import mlflow

    try:
        with store_errors():
            client = mlflow.MlflowClient()
            if reason:
                client.set_tag(run_id, Tag.ERROR, reason[:5000])
                if Tag.OUTCOME in client.get_run(run_id).data.tags:  # of an earlier attempt
                    client.delete_tag(run_id, Tag.OUTCOME)
            else:
                client.set_tag(run_id, Tag.OUTCOME, FINISHED)
                if Tag.ERROR in client.get_run(run_id).data.tags:  # of another worker, or an earlier attempt
                    client.delete_tag(run_id, Tag.ERROR)
            client.set_terminated(run_id, status)
    except UserError:
        if not reason:
            raise


@waits
def make_child(parent: str, name: str, tags: Mapping[str, str], params: Mapping[str, str]) -> str:
    """The id of a new child run that has its parameters and has not begun; `train.resume` of it begins it."""

    with store_errors():
        experiment = LoggedRun.open(parent).experiment_id
        return _schedule(experiment, name, {**tags, Tag.PARENT: parent}, params)


@waits
def retire(run: LoggedRun) -> None:
    """Leave a run behind, for which another is made: it is deleted if it had not begun, and ended if it was lost."""
    import mlflow

    if run.status == "SCHEDULED":
        with store_errors():
            mlflow.MlflowClient().delete_run(run.run_id)
    elif run.status == "RUNNING":
        end(run.run_id, "KILLED", "lost with the process that had started it, and begun again in another run")


def is_finished(run_id: str) -> bool:
    """Whether the run ended FINISHED."""
    return LoggedRun.open(run_id).finished


@waits
def children(parent: str) -> list[LoggedRun]:
    """The child runs, oldest first."""
    import mlflow

    chosen = f"tags.`{Tag.PARENT}` = '{parent}'"
    with store_errors():
        experiment = LoggedRun.open(parent).experiment_id
        found = mlflow.search_runs(
            [experiment], chosen, order_by=["start_time ASC"], output_format="list", max_results=10_000
        )
    return [LoggedRun.of(run) for run in found]


@waits
def keep_only(parent: str, run_id: str, package: Path) -> None:
    """Keep a packaged model with one child, and remove those that other children keep."""
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = mlflow.MlflowClient()
    with store_errors():
        client.log_artifacts(run_id, str(package), Artifact.PACKAGE)
        client.set_tag(run_id, Tag.PACKAGE, Artifact.PACKAGE)
        for child in children(parent):
            if child.run_id != run_id and child.tags.get(Tag.PACKAGE):
                repository = get_artifact_repository(child.artifact_uri)
                repository.delete_artifacts(Artifact.PACKAGE)  # type: ignore[no-untyped-call]
                client.delete_tag(child.run_id, Tag.PACKAGE)
