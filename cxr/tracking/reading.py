"""What runs have logged, read back: the names of tags, the paths of artifacts, and `LoggedRun`, their only reader.

`runs/record.py` writes most of them. A name is never changed: it is in the stores of our users.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from io import StringIO
from typing import Any

import pandas as pd

from cxr.config import TrainConfig, before_they_existed, unflatten
from cxr.errors import InUseError, UserError
from cxr.task import KAGGLE, Task
from cxr.tracking.outage import waits
from cxr.tracking.store import prepare, store_errors

_TEXTS = ("path", "digest", "group", "subtype")  # columns that stay text, though a patient may be called 007 or NA
# Before pandas 3, numbers lost their last bit unless this was asked for; it warns of it since.
_EXACT: Any = {} if pd.__version__ >= "3" else {"float_precision": "round_trip"}
_ENDS = ("_low", "_high")
FINISHED = "finished"  # the value of `Tag.OUTCOME`


class Tag(StrEnum):
    """The tags that we set on runs."""

    KIND = "cxr.kind"
    MEMBER = "cxr.member"
    ERROR = "cxr.error"
    OUTCOME = "cxr.outcome"
    HOST = "cxr.host"
    PROCESS = "cxr.process"  # of a run at work, so that one that was killed can be told
    PACKAGE = "cxr.weights"
    STRATEGY = "strategy"
    ARCH = "arch"
    SEED = "seed"
    DATA = "data"
    CLASSES = "classes"
    DATA_FINGERPRINT = "data_fingerprint"
    DEPTH = "depth"
    TEST_SPLIT = "test_split"  # by which the uses of a test split are counted
    WEIGHTS = "weights_used"
    DEVICE = "device"
    PRECISION = "precision"
    PROCESSES = "processes"
    COMMIT = "git_commit"
    IMAGES_SKIPPED = "images_skipped"
    AUDIT = "audit"
    AUDIT_INCONCLUSIVE = "audit_untold"
    FREEZING = "freezing"
    BEST_EPOCH = "best_epoch"
    BEST_TRIAL = "best_trial"
    TRIAL = "trial"
    CALIBRATION = "calibration"
    REGISTERED = "registered"
    VERDICT = "verdict"
    DESCRIPTION = "mlflow.note.content"
    RUN_NAME = "mlflow.runName"
    PARENT = "mlflow.parentRunId"


class RunKind(StrEnum):
    """The values of `Tag.KIND`; a training run that a user started has none."""

    SEARCH = "search"
    TRIAL = "trial"
    REFIT = "refit"
    COMPARISON = "comparison"
    CROSSVAL = "crossval"
    MEMBER = "member"
    EVALUATION = "evaluation"
    ENSEMBLE = "ensemble"

    @property
    def key_tag(self) -> str:
        """The tag of a parent that names what it runs, so that the same command finds it again."""
        return f"cxr.{self.value}"


class Artifact(StrEnum):
    """The artifacts of a run, as paths."""

    REPORT = "REPORT.html"  # in capitals, to be the first file in MLflow's list
    CONFIG = "config.json"
    AUDIT = "data/audit.txt"
    MANIFEST = "data/manifest.csv"
    HISTORY = "tables/history.csv"
    METRICS = "tables/metrics.csv"
    FREEZE_PROOFS = "freeze_proofs.json"
    LEARNING_CURVES = "plots/learning_curves.png"
    TRAIN_VIEWS = "plots/train_views.png"
    GRADCAM = "plots/test_gradcam.png"
    PACKAGE = "best_model"
    TRIALS = "search/trials.csv"
    BEST_PARAMETERS = "search/best.json"
    STRATEGIES = "comparison/strategies.csv"
    BACKBONES = "comparison/backbones.csv"
    PAIRS = "comparison/pairs.csv"
    COMPARISON_REPORT = "comparison/report.html"
    FOLDS = "crossval/folds.csv"
    OUT_OF_FOLD = "crossval/out_of_fold_predictions.csv"
    CROSSVAL_REPORT = "crossval/report.txt"
    CROSSVAL_PAGE = "crossval/report.html"


def predictions_path(split: str) -> str:
    """The predictions table of a split."""
    return f"tables/{split}_predictions.csv"


def report_path(split: str) -> str:
    """The classification report of a split."""
    return f"reports/{split}.txt"


def plot_path(name: str, folder: str = "plots") -> str:
    """The plot of that name."""
    return f"{folder}/{name}.png"


def metrics_table(metrics: Mapping[str, float]) -> pd.DataFrame:
    """Metrics as a table that a person can read: one a row, with the ends of its interval in columns of their own."""
    rows = [
        {"metric": name, "value": value, "low": metrics.get(f"{name}_low"), "high": metrics.get(f"{name}_high")}
        for name, value in metrics.items()
        if not name.endswith(_ENDS)
    ]
    return pd.DataFrame(rows)


def _metrics_of(table: pd.DataFrame) -> dict[str, float]:
    """The inverse of `metrics_table`."""
    rows = table.to_dict("records")
    found = {str(row["metric"]): float(row["value"]) for row in rows}
    ends = {f"{row['metric']}{end}": float(row[end[1:]]) for row in rows for end in _ENDS}
    return found | {name: value for name, value in ends.items() if not math.isnan(value)}


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """A run as the tracking store has it. `metrics` are the last values, `status` is MLflow's.

    Some metrics are only in a table that the run logged: `metric` and `every_metric` know them, too.
    """

    run_id: str
    experiment_id: str
    name: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    artifact_uri: str
    _tabled: list[dict[str, float]] = field(default_factory=list, repr=False, compare=False)  # once it is read

    @classmethod
    def of(cls, run: Any) -> LoggedRun:
        """From MLflow's own `Run`."""
        info, data = run.info, run.data
        name, address = info.run_name or "", str(info.artifact_uri)
        return cls(info.run_id, info.experiment_id, name, info.status, data.params, data.tags, data.metrics, address)

    @classmethod
    @waits
    def open(cls, run_id: str) -> LoggedRun:
        """Raises `UserError` when there is no such run, or no store."""
        import mlflow

        prepare()
        with store_errors():
            return cls.of(mlflow.get_run(run_id))

    @property
    def finished(self) -> bool:
        """Whether it finished, even if it was killed before its status was updated."""
        return self.status == "FINISHED" or self.tags.get(Tag.OUTCOME) == FINISHED

    @property
    def kind(self) -> RunKind | None:
        """What kind of run it is; None for a training run that a user started."""
        kind = self.tags.get(Tag.KIND)
        return RunKind(kind) if kind else None

    @property
    def threshold(self) -> float:
        """The decision threshold chosen on validation; NaN if it logged none."""
        return self.metric("chosen_threshold")

    @property
    def origin(self) -> str:
        """Which data and weights it began with."""
        return f"data {self.tags.get(Tag.DATA_FINGERPRINT)}, weights {self.tags.get(Tag.WEIGHTS)}"

    @property
    def task(self) -> Task:
        """The classes; runs of version 0.1 had those of the Kaggle set only."""
        names = self.tags.get(Tag.CLASSES)
        return Task(tuple(json.loads(names))) if names else KAGGLE

    @property
    def commit(self) -> str:
        """The commit of the code that made it."""
        return self.tags.get(Tag.COMMIT, "unknown")

    def train_params(self) -> dict[str, str]:
        """The parameters of a training run by plain names, younger ones as they were before they existed; empty for
        other runs.
        """
        own = {key: text for key, text in self.params.items() if key.startswith("train.")}
        return {key.removeprefix("train."): text for key, text in (before_they_existed() | own).items()} if own else {}

    def config(self) -> TrainConfig:
        """The configuration of a training run. Raises ValueError or `UserError` for values that cannot be read."""
        return unflatten(self.params)

    def metric(self, name: str) -> float:
        """The last value of a metric; NaN if it logged none. Raises `UserError` when its table cannot be read."""
        return self.metrics[name] if name in self.metrics else self.tabled_metrics().get(name, math.nan)

    def every_metric(self) -> dict[str, float]:
        """All that it logged, also in its table. Raises `UserError` when that cannot be read."""
        return {**self.tabled_metrics(), **self.metrics}

    def tabled_metrics(self) -> dict[str, float]:
        """Those in its table, read once; none for runs of before there was one, which logged all as metrics.

        Raises `UserError` when it cannot be read.
        """
        if not self._tabled:
            self._tabled.append(_metrics_of(self.table(Artifact.METRICS)) if self._has(Artifact.METRICS) else {})
        return self._tabled[0]

    def _has(self, path: str) -> bool:
        import mlflow

        with store_errors():
            found = mlflow.MlflowClient().list_artifacts(self.run_id, path.rpartition("/")[0])
        return path in {each.path for each in found}

    def number(self, param: str) -> float:
        """A parameter as a number; NaN if it is missing or not a number."""
        try:
            return float(self.params.get(param, "nan"))
        except ValueError:
            return math.nan

    @waits
    def table(self, path: str) -> pd.DataFrame:
        """A table (CSV) that it logged. Raises `UserError` when it is missing."""
        import mlflow

        with store_errors():
            text = mlflow.artifacts.load_text(f"{self.artifact_uri}/{path}")
        table: pd.DataFrame = pd.read_csv(StringIO(text), converters=dict.fromkeys(_TEXTS, str), **_EXACT)
        return table

    def predictions(self, split: str) -> pd.DataFrame:
        """The predictions table of a split. Raises `UserError` when it is missing."""
        return self.table(predictions_path(split))

    def history(self, metric: str) -> dict[int, float]:
        """Step -> value of a metric, as `metric_history`."""
        return metric_history(self.run_id, metric)

    def require_not_elsewhere(self) -> None:
        """Raise `InUseError` if it is RUNNING on another machine, whose lock files are not visible here."""
        host = self.tags.get(Tag.HOST)
        if self.status == "RUNNING" and host not in (None, socket.gethostname()):
            raise InUseError(
                f"run {self.run_id} is running on {host}; wait for it. If that machine is gone, end the run first: "
                f"python -c \"import mlflow; mlflow.MlflowClient().set_terminated('{self.run_id}', 'KILLED')\""
            )


@waits
def unfinished_run(run_id: str) -> LoggedRun:
    """A run that is to be continued.

    Raises `UserError` when there is no such run, or it is finished or running on another machine.
    """
    import mlflow

    run = LoggedRun.open(run_id)
    if run.finished and run.status != "FINISHED":  # it was killed on its last step
        with store_errors():
            mlflow.MlflowClient().set_terminated(run_id, "FINISHED")
    if run.finished:
        raise UserError(f"run {run_id} is finished: there is nothing to resume; start a new one")
    run.require_not_elsewhere()
    return run


@waits
def metric_history(run_id: str, metric: str) -> dict[int, float]:
    """Step -> value of a run's metric; of a step logged more than once, the last."""
    import mlflow

    with store_errors():
        logged = mlflow.MlflowClient().get_metric_history(run_id, metric)
    return {each.step: each.value for each in sorted(logged, key=lambda each: (each.step, each.timestamp))}


@dataclass(frozen=True, slots=True)
class DataSet:
    """The images that a run noted as used: their name, their fingerprint, and how many there are, if it is known.

    Runs of version 0.1 called them `FINGERPRINT-train`, with a digest of MLflow's own.
    """

    name: str
    digest: str
    images: int | None


def data_sets(run_id: str) -> dict[str, DataSet]:
    """What the images of a run were used for (`training`, `validation`, `testing`) -> which they were."""
    import mlflow

    with store_errors():
        inputs = mlflow.get_run(run_id).inputs
    noted = [(each.tags[0].value, each.dataset) for each in inputs.dataset_inputs if each.tags] if inputs else []
    return {use: DataSet(own.name, own.digest, json.loads(own.profile or "{}").get("num_rows")) for use, own in noted}


def source_run(uri: str) -> str | None:
    """The id of the run that logged a model; None where the store does not know (a plain folder)."""
    import mlflow

    prepare()
    try:
        with store_errors():
            found: str | None = mlflow.models.get_model_info(uri).run_id
    except UserError:
        return None
    return found
