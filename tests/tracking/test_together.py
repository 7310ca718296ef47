"""Processes that start together on a folder where nothing is yet."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities import DatasetInput
from mlflow.exceptions import MlflowException
from small import SMALL
from started import Started

from cxr.tracking.lifecycle import open_run


@pytest.mark.slow
def test_runs_that_start_together_in_an_empty_folder_all_finish(phantoms: Path, tmp_path: Path) -> None:
    options = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "CXR_CACHE": str(tmp_path / "cache")}
    started = [
        Started(
            "train", "--data-dir", str(phantoms), *options, "--strategy", "frozen", "--seed", str(seed), **environment
        )
        for seed in range(4)
    ]
    ended = [process.finish() for process in started]
    assert [code for code, _ in ended] == [0] * 4, "\n".join(output for _, output in ended)
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    runs = mlflow.search_runs(experiment_names=["cxr"], output_format="list")
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    versions = mlflow.MlflowClient().search_model_versions("name = 'cxr-pneumonia'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3, 4]
    best = min(versions, key=lambda version: float(version.tags["val_loss"]))
    champion = mlflow.MlflowClient().get_model_version_by_alias("cxr-pneumonia", "champion")
    assert champion.tags["val_loss"] == best.tags["val_loss"]


def test_images_that_another_run_has_noted_meanwhile_are_noted_again(
    in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, errors = (
        mlflow.MlflowClient.log_inputs,
        ["(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name", "no space left"],
    )
    calls: list[str] = []

    def collide(client: mlflow.MlflowClient, run_id: str, datasets: list[DatasetInput]) -> None:
        calls.append(run_id)
        if errors:
            raise MlflowException(errors.pop(0))
        log(client, run_id, datasets)

    table = pd.DataFrame({"path": ["a"], "digest": ["00"], "split": ["train"], "label": [0]})
    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", collide)
    with open_run("one") as tracker, pytest.raises(MlflowException, match="no space left"):
        tracker.dataset(table, Path("images"), "train", "training")  # collides, then fails for another reason
    with open_run("two") as tracker:
        errors.append("(psycopg.errors.UniqueViolation) IntegrityError")
        tracker.dataset(table, Path("images"), "train", "training")
    assert len(calls) == 4
    assert [each.dataset.name for each in mlflow.get_run(tracker.run_id).inputs.dataset_inputs] == ["images-train"]
