"""Other classes than the Kaggle set's: two of other names, and three (the phantoms by subtype) end to end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from command import run_main
from mlflow.tracking import MlflowClient
from sklearn import metrics as sk
from small import quiet, small

from cxr.config import CompareConfig, CrossvalConfig, TrainConfig
from cxr.data.kaggle import index_folder
from cxr.errors import UserError
from cxr.evaluation.predictions import matrix_of
from cxr.runs.ensemble import ensemble_tracked
from cxr.runs.train import run_tracked
from cxr.runs.verify import verify
from cxr.serving.explain import explain_files
from cxr.studies.compare import compare_tracked
from cxr.studies.crossval import crossval_tracked
from cxr.tracking import registry
from cxr.tracking.reading import Artifact, LoggedRun

CLASSES = ("NORMAL", "BACTERIA", "VIRUS")
NAME = "three-classes"


@pytest.fixture(scope="module")
def config(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    cache = str(tmp_path_factory.mktemp("cache"))
    return small(TrainConfig, phantoms, labels="subtype", register=NAME, cache_dir=cache, bootstrap=20)


@pytest.fixture(scope="module")
def run(config: TrainConfig, store: str) -> LoggedRun:
    """A finished run, registered as the champion."""
    mlflow.set_tracking_uri(store)
    return LoggedRun.open(run_tracked(config, say=quiet).run_id)


def test_the_classes_are_recorded_in_run_model_and_registry(run: LoggedRun, in_store: str) -> None:
    assert run.task.classes == CLASSES
    version = MlflowClient().get_model_version_by_alias(NAME, "champion")
    assert list(json.loads(version.tags["class_to_index"])) == list(CLASSES)
    assert version.tags["positive"] == "none"
    card = registry.load(f"models:/{NAME}@champion").card
    assert (card.task.classes, card.task.positive) == (CLASSES, None)
    assert "chosen_threshold" not in run.metrics
    assert "The most probable class decides." in version.description
    assert all(f"\n| {name}" in version.description for name in CLASSES)


def test_the_metrics_are_scikit_learns(run: LoggedRun, in_store: str) -> None:
    table = run.predictions("test")
    labels, scores, decisions = table["label"], matrix_of(table), table["decision"]
    expected = {
        "accuracy": sk.accuracy_score(labels, decisions),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, decisions),
        "recall": sk.recall_score(labels, decisions, average="macro"),
        "precision": sk.precision_score(labels, decisions, average="macro", zero_division=0),
        "f1": sk.f1_score(labels, decisions, average="macro"),
        "roc_auc": sk.roc_auc_score(labels, scores, multi_class="ovr"),
        "log_loss": sk.log_loss(labels, scores),
        "recall_of_virus": sk.recall_score(labels == 2, decisions == 2),
        "pr_auc_of_bacteria": sk.average_precision_score(labels == 1, scores[:, 1]),
    }
    found = {name: run.metric(f"test_{name}") for name in expected}
    assert found == pytest.approx(expected)
    assert run.metric("test_recall_of_normal_low") <= run.metric("test_recall_of_normal_high")


def test_every_figure_and_report_is_there(run: LoggedRun, in_store: str) -> None:
    client = MlflowClient()
    plots = {Path(file.path).name for file in client.list_artifacts(run.run_id, "plots")}
    for kind in ("confusion_matrix", "roc", "reliability", "metrics", "selective", "gradcam"):
        assert f"test_{kind}.png" in plots
    assert "test_confusion_matrix_chosen.png" not in plots
    text = mlflow.artifacts.load_text(f"{run.artifact_uri}/reports/test.txt")
    assert all(name in text for name in (*CLASSES, "the most probable class decides"))


def test_it_is_verified(run: LoggedRun, in_store: str) -> None:
    findings = verify(run.run_id)
    assert [finding.line() for finding in findings if not finding.ok] == []
    assert len(findings) == 9


def test_the_served_model_answers_as_it_was_evaluated(run: LoggedRun, in_store: str, phantoms: Path) -> None:
    table = run.predictions("test").head(4)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    found = model.predict([(phantoms / path).read_bytes() for path in table["path"]])
    named = [f"probability_{name.lower()}" for name in CLASSES]
    assert list(found) == ["label", "probability", "decision", *named, "familiarity", "abstain"]
    np.testing.assert_allclose(found[named], table[named], atol=1e-4)
    assert [CLASSES[index] for index in table["decision"]] == list(found["label"])
    np.testing.assert_allclose(found["probability"], found[named].max(axis=1))


def test_it_is_exported_explained_and_predicted(
    run: LoggedRun, in_store: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = registry.load(f"models:/{NAME}@champion")
    image = phantoms / run.predictions("test")["path"][0]
    assert len(explain_files(predictor, [image], tmp_path / "explained")) == 1
    predictor.export(tmp_path / "exported")
    state = torch.load(tmp_path / "exported/X_ray_classifier.pth", weights_only=True)
    assert state["fc.weight"].shape[0] == 3
    assert json.loads((tmp_path / "exported/class_to_index.json").read_text()) == dict(
        zip(CLASSES, range(3), strict=True)
    )
    assert run_main(monkeypatch, "predict", str(image), "--model", f"models:/{NAME}@champion") == 0


@pytest.mark.slow
def test_the_onnx_model_gives_the_probabilities_of_all_classes(run: LoggedRun, in_store: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    predictor = registry.load(f"models:/{NAME}@champion")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64), np.uint8)
    file = predictor.export(tmp_path, onnx=True)[-1]
    (found,) = onnxruntime.InferenceSession(file).run(None, {"image": images})
    expected = predictor.predict(list(images))[[f"probability_{name.lower()}" for name in CLASSES]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_its_test_split_is_evaluated_by_the_command(
    run: LoggedRun,
    in_store: str,
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run.predictions("test")
    listed = pd.DataFrame({"path": rows["path"], "label": [CLASSES[label] for label in rows["label"]]})
    folder, films = tmp_path / "flat", Path(shutil.copytree(phantoms, tmp_path / "films"))
    listed.to_csv(films / "films.csv", index=False)
    for path, label in zip(listed["path"], listed["label"], strict=True):
        target = folder / label / Path(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((phantoms / path).read_bytes())
    for source in (folder, films / "films.csv"):
        arguments = ("--model", f"models:/{NAME}@champion", "--data-dir", str(source), "--bootstrap", "10")
        assert run_main(monkeypatch, "evaluate", *arguments) == 0
        newest = mlflow.search_runs(search_all_experiments=True, output_format="list", max_results=1)[0]
        assert newest.data.metrics["external_roc_auc"] == pytest.approx(run.metric("test_roc_auc"), abs=1e-3)
    listed.replace("VIRUS", "FUNGUS").to_csv(films / "films.csv", index=False)
    assert run_main(monkeypatch, "evaluate", *arguments) == 2
    assert "unknown to the model (FUNGUS)" in capsys.readouterr().err


def test_strategies_are_compared_and_become_ensembles(config: TrainConfig, in_store: str) -> None:
    compared = CompareConfig(train=replace(config, register="none"), strategies="frozen,partial", seeds=2)
    compare_tracked(compared, say=quiet)
    (parent,) = mlflow.search_runs(
        search_all_experiments=True, output_format="list", filter_string="tags.`cxr.kind` = 'comparison'", max_results=1
    )
    whole = LoggedRun.of(parent)
    table = whole.table(Artifact.STRATEGIES)
    assert {"recall_of_virus", "roc_auc_of_bacteria_low", "roc_auc_seeds"} <= set(table.columns)
    report = mlflow.artifacts.load_text(f"{whole.artifact_uri}/{Artifact.COMPARISON_REPORT}")
    assert "Each class on the test split" in report
    children = mlflow.search_runs(
        search_all_experiments=True,
        output_format="list",
        filter_string=f"tags.`mlflow.parentRunId` = '{whole.run_id}' and tags.strategy = 'frozen'",
    )
    together = LoggedRun.open(ensemble_tracked([child.info.run_id for child in children], "none", say=quiet))
    assert together.task.classes == CLASSES
    assert [finding.line() for finding in verify(together.run_id) if not finding.ok] == []


def test_folds_are_pooled_with_the_metrics_of_each_class(config: TrainConfig, in_store: str) -> None:
    folds = CrossvalConfig(train=replace(config, strategy="frozen", register="none"), folds=2)
    table = crossval_tracked(folds, say=quiet)
    assert {"recall_of_virus", "roc_auc"} <= set(table.columns)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"calibration": "platt"}, "--calibration platt: is for two"),
        ({"threshold": "f1"}, "--threshold f1: is for two"),
    ],
)
def test_what_is_for_two_classes_is_refused_by_name(
    config: TrainConfig, in_store: str, options: dict[str, str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        run_tracked(replace(config, strategy="frozen", register="none", **options), say=quiet)  # type: ignore[arg-type]


def test_two_classes_of_other_names_in_a_shuffled_list_give_the_same_numbers(
    config: TrainConfig, in_store: str, phantoms: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    table = index_folder(folder).rename(columns={"group": "patient", "official": "split"}).drop(columns="digest")
    listed = table.assign(label=[("healthy", "ill")[label] for label in table["label"]])
    listed.sample(frac=1, random_state=1).to_csv(folder / "films.csv", index=False)
    plain = replace(config, labels="class", strategy="frozen", register="none")
    theirs, own = (
        run_tracked(replace(plain, data_dir=str(source)), say=quiet) for source in (phantoms, folder / "films.csv")
    )
    assert own.data.task.classes == ("healthy", "ill")
    assert own.data.fingerprint == theirs.data.fingerprint
    np.testing.assert_array_equal(own.test.probabilities, theirs.test.probabilities)
    assert own.test.values == theirs.test.values
