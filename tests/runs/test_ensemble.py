"""Several finished runs as one registered model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from command import run_main
from mlflow.tracking import MlflowClient
from scipy.special import expit
from small import quiet, small

from cxr.config import TrainConfig
from cxr.errors import UserError
from cxr.runs.ensemble import ensemble_tracked
from cxr.runs.train import run_tracked
from cxr.runs.verify import verify
from cxr.serving.explain import explain_files
from cxr.serving.predictor import Predictor
from cxr.tracking import registry
from cxr.tracking.reading import LoggedRun

NAME = "together"


@pytest.fixture(scope="module")
def members(store: str, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two finished runs that differ in strategy and seed."""
    mlflow.set_tracking_uri(store)
    cache = str(tmp_path_factory.mktemp("cache"))
    config = small(TrainConfig, phantoms, register="none", cache_dir=cache, val_split="official")
    configs = [replace(config, strategy="frozen"), replace(config, strategy="partial", seed=1)]
    return [run_tracked(each, say=quiet).run_id for each in configs]


@pytest.fixture(scope="module")
def whole(members: list[str], store: str) -> LoggedRun:
    """Their ensemble, registered."""
    mlflow.set_tracking_uri(store)
    return LoggedRun.open(ensemble_tracked(members, NAME, say=quiet))


def probabilities(run_id: str, split: str) -> np.ndarray:
    table = LoggedRun.open(run_id).predictions(split)
    return np.asarray(expit(table["logit_pneumonia"] - table["logit_normal"]), np.float64)


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_uncalibrated_probability_is_the_mean_of_those_of_the_members(
    whole: LoggedRun, members: list[str], in_store: str, split: str
) -> None:
    expected = np.mean([probabilities(member, split) for member in members], axis=0)
    np.testing.assert_allclose(whole.predictions(split)["uncalibrated"], expected, atol=1e-6)


def test_it_is_a_version_that_answers_as_it_was_evaluated(whole: LoggedRun, in_store: str, phantoms: Path) -> None:
    version = MlflowClient().get_model_version_by_alias(NAME, "champion")
    assert (version.tags["members"], version.tags["strategy"]) == ("2", "frozen+partial")
    assert float(version.tags["val_loss"]) == pytest.approx(whole.metric("val_loss"))
    assert "an ensemble of 2" in version.description
    audit = LoggedRun.open(whole.params["ensemble.runs"].split()[0]).tags["audit"]
    assert whole.tags["audit"] == audit
    assert (f"The audit of the images found: {audit}" in version.description) == (audit != "nothing found")
    assert "chest\\_xray-train" in version.description
    table = whole.predictions("test").head(5)
    predictor = registry.load(f"models:/{NAME}@champion")
    found = predictor.predict_files([phantoms / path for path in table["path"]])
    np.testing.assert_allclose(found["probability"], table["probability"], atol=1e-4)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    answers = model.predict([(phantoms / table["path"][0]).read_bytes()])
    assert answers["probability"][0] == pytest.approx(table["probability"][0], abs=1e-4)


def test_it_is_verified_from_its_members_and_images(whole: LoggedRun, in_store: str) -> None:
    findings = verify(whole.run_id)
    assert [finding.line() for finding in findings if not finding.ok] == []
    assert "2 members" in [finding.detail for finding in findings]
    assert whole.tags["device"].startswith("cpu (")
    altered = whole.predictions("test")
    altered.loc[0, "logit_pneumonia"] += 1.0
    with mlflow.start_run(whole.run_id):
        mlflow.log_text(altered.to_csv(index=False), "tables/test_predictions.csv")
    broken = {finding.check for finding in verify(whole.run_id) if not finding.ok}
    assert "logits from those of the members" in broken
    with mlflow.start_run(whole.run_id):
        altered.loc[0, "logit_pneumonia"] -= 1.0
        mlflow.log_text(altered.to_csv(index=False), "tables/test_predictions.csv")


@pytest.mark.parametrize(("device", "fine"), [("cuda (some GPU)", True), ("cpu (2 threads)", False)])
def test_a_loss_that_a_gpu_measured_may_differ_a_little(
    whole: LoggedRun, in_store: str, device: str, fine: bool
) -> None:
    client, run_id, loss = MlflowClient(), whole.run_id, whole.metric("stressed_val_loss")
    client.set_tag(run_id, "device", device)
    client.log_metric(run_id, "stressed_val_loss", 1.005 * loss)
    found = {finding.check: finding.ok for finding in verify(run_id)}
    client.log_metric(run_id, "stressed_val_loss", loss)
    client.set_tag(run_id, "device", whole.tags["device"])
    assert found["stressed validation from model and data"] is fine


def test_it_is_exported_and_explained(whole: LoggedRun, in_store: str, phantoms: Path, tmp_path: Path) -> None:
    predictor = registry.load(f"models:/{NAME}@champion")
    files = [file.name for file in predictor.export(tmp_path / "out")]
    assert files == ["X_ray_classifier_0.pth", "X_ray_classifier_1.pth", "class_to_index.json", "model.json"]
    state = torch.load(tmp_path / "out/X_ray_classifier_1.pth", weights_only=True)
    assert torch.equal(state["fc.bias"], predictor.networks[1].fc.bias)
    (drawn,) = explain_files(predictor, [next(phantoms.glob("test/*/*"))], tmp_path / "maps")
    assert drawn.exists()


def test_runs_that_cannot_be_combined_are_refused(
    members: list[str],
    whole: LoggedRun,
    in_store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = len(mlflow.search_runs(search_all_experiments=True))
    for runs, says in (
        ([members[0]], "two or more different runs"),
        ([members[0], members[0]], "two or more different runs"),
        ([members[0], whole.run_id], "not a finished training run"),
        ([members[0], "0" * 32], "0" * 32),
        ([*members, "--name", "a/b"], "--name a/b: use only letters"),
    ):
        assert run_main(monkeypatch, "models", "ensemble", *runs) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert says in error
    assert len(mlflow.search_runs(search_all_experiments=True)) == before


def test_a_run_of_version_0_1_cannot_come_first(
    members: list[str], in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(uri: str) -> Predictor:
        predictor = load_as_it_is(uri)
        predictor.familiar = None
        return predictor

    load_as_it_is = registry.load
    monkeypatch.setattr("cxr.runs.ensemble.registry.load", load)
    with pytest.raises(UserError, match=r"made by version 0\.1"):
        ensemble_tracked(members, NAME, say=quiet)


def test_runs_with_other_parameters_or_images_are_refused(
    members: list[str], in_store: str, phantoms: Path, tmp_path: Path
) -> None:
    other = run_tracked(small(TrainConfig, phantoms, register="none", image_size=48, strategy="frozen"), say=quiet)
    with pytest.raises(UserError, match=r"differ in image_size \(48, 64\)"):
        ensemble_tracked([members[0], other.run_id], NAME, say=quiet)
    moved = Path(shutil.copytree(phantoms, tmp_path / "moved"))
    next(moved.glob("train/NORMAL/*")).unlink()
    with pytest.raises(UserError, match="need the same images"):
        ensemble_tracked(members, NAME, data_dir=str(moved), say=quiet)
