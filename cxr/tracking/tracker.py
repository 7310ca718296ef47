"""What a run logs to: an MLflow run, or nothing at all."""

from __future__ import annotations

import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from matplotlib.figure import Figure

from cxr.config import without_password
from cxr.figures.style import save_png
from cxr.tracking.reading import Artifact, RunKind, metric_history
from cxr.tracking.store import one_at_a_time
from cxr.tracking.views import OPENS, key_of, name_of, saved_view, state_of


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

    def where(self, kind: RunKind | None = None, rates: Sequence[str] = ()) -> list[str]:
        """Lines that tell a person where to look; `kind` is that of a parent, `rates` what a search varies."""


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

    def where(self, kind: RunKind | None = None, rates: Sequence[str] = ()) -> list[str]:
        """Nowhere."""
        return ["not tracked"]


def _log_input(data: Any, context: str) -> None:
    """Runs that note the same images at the same time would all add them; MLflow does not lock, nor does its server."""
    import mlflow
    from mlflow.exceptions import MlflowException

    with one_at_a_time():
        try:
            mlflow.log_input(data, context=context)
        except MlflowException as error:
            if "IntegrityError" not in str(error):
                raise
            mlflow.log_input(data, context=context)  # another run has added them meanwhile


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
            save_png(figure, file)

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
            _log_input(data, context)

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

    def where(self, kind: RunKind | None = None, rates: Sequence[str] = ()) -> list[str]:
        """The command that opens the UI, and the pages that matter: for a parent of a `kind`, the view of its children
        and its own page; else the run's report and the view of all runs."""
        import mlflow

        uri = without_password(mlflow.get_tracking_uri())
        remote = uri.startswith("http")
        base = uri.rstrip("/") if remote else "http://127.0.0.1:5000"
        experiment = f"{base}/#/experiments/{self.experiment_id}"
        key, name, state = key_of(kind, self.run_id), name_of(kind, self.run_id), state_of(kind, self.run_id, rates)
        view = f"{experiment}/{saved_view(self.experiment_id, key, state, name)}"
        report = "" if kind else f"/artifacts/{Artifact.REPORT}"
        own = f"{experiment}/runs/{self.run_id}{report}?{OPENS}"
        return [*([] if remote else [f"mlflow ui --backend-store-uri {uri}"]), *([view, own] if kind else [own, view])]


@contextmanager
def _artifact(path: str, run_id: str) -> Iterator[Path]:
    """A temporary file of that name, logged as an artifact in that folder when the block ends well."""
    import mlflow

    folder, _, name = path.rpartition("/")
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / name
        yield file
        mlflow.log_artifact(str(file), folder or None, run_id)
