"""What a run logs to: an MLflow run, or nothing at all."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from matplotlib.figure import Figure

from cxr.figures.style import save_png
from cxr.tracking.delivery import (
    Entry,
    artifact_entry,
    dataset_entry,
    deliver,
    metrics_entry,
    params_entry,
    tags_entry,
)
from cxr.tracking.outage import OUTAGE, pages_address, store_address, waits
from cxr.tracking.outbox import Outbox
from cxr.tracking.reading import Artifact, LoggedRun, RunKind, metric_history
from cxr.tracking.views import OPENS, key_of, name_of, saved_view, state_of

Say = Callable[[str], object]


class Tracker(Protocol):
    """What the pipeline tells of a run."""

    run_id: str

    def write_ahead(self, patience: float, say: Say) -> None:
        """From now on, what is logged is kept on disk first, and the caller does not wait until it is delivered.

        Where it has to wait for a store that does not answer, it does so for `patience` minutes; `say` says so.
        """

    def drain(self) -> None:
        """Wait until all that was logged is in the store."""

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

    def dataset(self, table: pd.DataFrame, source: Path, split: str, context: str) -> None:
        """Note which images the run used, and for what: the rows of a manifest that are one split of a source."""

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

    def write_ahead(self, patience: float, say: Say) -> None:
        """Nothing changes."""

    def drain(self) -> None:
        """There is nothing to wait for."""

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

    def dataset(self, table: pd.DataFrame, source: Path, split: str, context: str) -> None:
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


class MlflowTracker:
    """A run in MLflow, the active one or a parent of it."""

    def __init__(self, run: Any, outbox: Path | None = None):
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self._recorded_tags = dict(run.data.tags)
        self._metrics = set(run.data.metrics)
        self._folder = outbox
        self._outbox: Outbox | None = None

    def deliver_left(self) -> None:
        """Deliver what an earlier attempt at the run had no time for. Raises what MLflow raises."""
        if self._folder is not None and Outbox(self.run_id, self._folder).deliver_left():
            self._metrics = set(LoggedRun.open(self.run_id).metrics)

    def write_ahead(self, patience: float, say: Say) -> None:
        """To the folder that `open_run` was given, if any."""
        OUTAGE.allow(patience, say)
        if self._folder is not None and self._outbox is None:
            self._outbox = Outbox(self.run_id, self._folder)
            self._outbox.start()

    def drain(self) -> None:
        """Wait until all is in the store, as `Outbox.drain`."""
        if self._outbox is not None:
            self._outbox.drain(OUTAGE.say)

    def close(self) -> None:
        """Deliver what can be delivered now; the rest stays on disk for the next attempt."""
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None

    def params(self, values: Mapping[str, str]) -> None:
        """One call for all."""
        self._log(params_entry(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """One call for all."""
        self._log(tags_entry(values))

    def metrics(self, values: Mapping[str, float], step: int | None = None, model_id: str | None = None) -> None:
        """One call for all: one by one they cost 6 ms each with SQLite."""
        self._log(metrics_entry(values, step, model_id))

    def figure(self, figure: Figure, path: str) -> None:
        """As PNG at the figure's own resolution."""
        with self._artifact(path) as file:
            save_png(figure, file)

    def text(self, text: str, path: str) -> None:
        """As it is."""
        with self._artifact(path) as file:
            file.write_text(text, encoding="utf-8")

    def table(self, table: pd.DataFrame, path: str) -> None:
        """As CSV."""
        with self._artifact(path) as file:
            table.to_csv(file, index=False)

    def dataset(self, table: pd.DataFrame, source: Path, split: str, context: str) -> None:
        """As an MLflow dataset with schema, profile and source, named after folder and split (`chest_xray-train`).

        Its digest is the fingerprint of its images, labels and split.
        """
        self._log(dataset_entry(table, source, split, context))

    def _log(self, entry: Entry, folder: Path = Path()) -> None:
        """Through the outbox, or else at once, as long as the store may take."""
        if self._outbox is not None:
            self._outbox.put(entry)
        else:
            OUTAGE.ride_out(lambda: deliver(self.run_id, entry, folder))

    @contextmanager
    def _artifact(self, path: str) -> Iterator[Path]:
        """A file of that name, to be written in the block, and logged as an artifact in that folder."""
        folder, _, name = path.rpartition("/")
        if self._outbox is not None:
            with self._outbox.artifact(name) as file:
                yield file
            self._log(artifact_entry(f"{file.parent.name}/{name}", folder))
            return
        with tempfile.TemporaryDirectory() as work:
            yield Path(work) / name
            self._log(artifact_entry(name, folder), Path(work))

    def recorded_tags(self) -> Mapping[str, str]:
        """As the store had them."""
        return self._recorded_tags

    def logged(self, metric: str) -> Mapping[int, float]:
        """As the store had it."""
        return metric_history(self.run_id, metric) if metric in self._metrics else {}

    @waits
    def count(self, tags: Mapping[str, str]) -> int:
        """In all experiments, whatever became of the runs."""
        import mlflow

        chosen = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = mlflow.search_runs(
            search_all_experiments=True, filter_string=chosen, output_format="list", max_results=50_000
        )
        return sum(run.info.run_id != self.run_id for run in found)

    @waits
    def where(self, kind: RunKind | None = None, rates: Sequence[str] = ()) -> list[str]:
        """The command that opens the UI, and the pages that matter: for a parent of a `kind`, the view of its children
        and its own page; else the run's report and the view of all runs."""
        uri = store_address()
        ui = [] if uri.startswith("http") else [f"mlflow ui --backend-store-uri {uri}"]
        experiment = f"{pages_address()}/#/experiments/{self.experiment_id}"
        key, name, state = key_of(kind, self.run_id), name_of(kind, self.run_id), state_of(kind, self.run_id, rates)
        view = f"{experiment}/{saved_view(self.experiment_id, key, state, name)}"
        report = "" if kind else f"/artifacts/{Artifact.REPORT}"
        own = f"{experiment}/runs/{self.run_id}{report}?{OPENS}"
        return [*ui, *([view, own] if kind else [own, view])]
