"""What a run logs, as entries that can be kept on disk, and how they reach MLflow.

Delivering an entry twice has the effect of delivering it once: metrics carry the time at which they were logged, which
is part of their key in MLflow's databases; the rest is overwritten by the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cxr.tracking.store import one_at_a_time

Entry = Mapping[str, Any]  # `kind`, and what that kind needs; JSON can hold it


def params_entry(values: Mapping[str, str]) -> Entry:
    """Parameters."""
    return {"kind": "params", "values": {name: str(value) for name, value in values.items()}}


def tags_entry(values: Mapping[str, str]) -> Entry:
    """Tags."""
    return {"kind": "tags", "values": dict(values)}


def metrics_entry(values: Mapping[str, float], step: int | None, model_id: str | None) -> Entry:
    """Metrics, with the time of this call."""
    from mlflow.utils.time import get_current_time_millis

    numbers = {name: float(value) for name, value in values.items()}
    time: int = get_current_time_millis()  # type: ignore[no-untyped-call]
    return {"kind": "metrics", "values": numbers, "step": step or 0, "time": time, "model_id": model_id}


def artifact_entry(file: str, folder: str) -> Entry:
    """A file, logged by its name in a folder of the run's artifacts (empty: at the top)."""
    return {"kind": "artifact", "file": file, "folder": folder}


def dataset_entry(table: pd.DataFrame, source: str, name: str, context: str) -> Entry:
    """An MLflow dataset with schema, digest and source."""
    import mlflow

    with warnings.catch_warnings():
        # The source is a folder, whichever of its two classes for that MLflow takes; no label is ever missing.
        warnings.filterwarnings("ignore", "The specified dataset source can be interpreted", UserWarning)
        warnings.filterwarnings("ignore", "Hint: Inferred schema contains integer", UserWarning)
        data = mlflow.data.from_pandas(table, source=source, name=name, targets="label")  # type: ignore[attr-defined]
        return {"kind": "dataset", "values": dict(data._to_mlflow_entity()), "context": context}


def deliver(run_id: str, entry: Entry, folder: Path) -> None:
    """Send an entry to the tracking store; its file is in `folder`. Raises what MLflow raises."""
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    client, values = mlflow.MlflowClient(), entry.get("values", {})
    if entry["kind"] == "params":
        client.log_batch(run_id, params=[Param(name, value) for name, value in values.items()])
    elif entry["kind"] == "tags":
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in values.items()])
    elif entry["kind"] == "metrics":
        when, owner = (entry["time"], entry["step"]), {"model_id": entry["model_id"], "run_id": run_id}
        client.log_batch(run_id, metrics=[Metric(name, value, *when, **owner) for name, value in values.items()])
    elif entry["kind"] == "artifact":
        client.log_artifact(run_id, str(folder / entry["file"]), entry["folder"] or None)
    else:
        _log_input(run_id, entry)


def _log_input(run_id: str, entry: Entry) -> None:
    """Runs that note the same images at the same time would all add them; MLflow does not lock, nor does its server."""
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    tag = InputTag("mlflow.data.context", entry["context"])
    used = DatasetInput(Dataset(**entry["values"]), [tag])
    with one_at_a_time():
        try:
            mlflow.MlflowClient().log_inputs(run_id, [used])
        except MlflowException as error:
            if "IntegrityError" not in str(error):
                raise
            mlflow.MlflowClient().log_inputs(run_id, [used])  # another run has added them meanwhile
