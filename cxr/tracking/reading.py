"""What runs have logged, read back."""

from __future__ import annotations

import socket
from io import StringIO
from typing import Any

import pandas as pd

from cxr.errors import InUseError, UserError
from cxr.tracking.store import HOST, OUTCOME, explained, prepare


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
