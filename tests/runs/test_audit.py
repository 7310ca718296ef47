"""Audits in runs and on the command line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from command import run_main

from cxr.config import TrainConfig
from cxr.data.load import read_data
from cxr.errors import UserError
from cxr.network.resnet import build_model
from cxr.runs import audit as auditing
from cxr.runs.audit import audited
from cxr.runs.result import RunResult
from cxr.tracking.reading import LoggedRun
from cxr.training.batch_source import pooled_features


@pytest.fixture
def config(phantoms: Path) -> TrainConfig:
    return TrainConfig(data_dir=str(phantoms), weights="random", image_size=64, val_split="official")


def leaky(phantoms: Path, tmp_path: Path) -> Path:
    """A copy in which a training image is also in test."""
    folder = Path(shutil.copytree(phantoms, tmp_path / "leaky"))
    source = sorted((folder / "train" / "NORMAL").iterdir())[0]
    shutil.copy(source, folder / "test" / "NORMAL" / "IM-9999-0001.jpeg")
    return folder


def test_features_are_in_the_order_of_the_manifest_and_shift_is_tested(config: TrainConfig) -> None:
    data, (model, _) = read_data(config), build_model("resnet18", "random", 0)
    features = pooled_features(config, data, model, "fp32")
    assert features.shape == (len(data.manifest), 512)
    shuffled = replace(data, manifest=data.manifest.iloc[::-1].reset_index(drop=True))
    assert np.array_equal(pooled_features(config, shuffled, model, "fp32")[::-1], features)
    checks = {finding.check for finding in audited(config, data, model)}
    assert {"shift between splits", "shortcuts", "near duplicates"} <= checks


def test_findings_are_cached_until_an_input_changes(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_data(config)
    first = audited(config, data, None)
    monkeypatch.setattr(auditing, "audit", lambda *arguments, **options: pytest.fail("looked again"))
    assert audited(config, data, None) == first
    with pytest.raises(pytest.fail.Exception):
        audited(config, replace(data, fingerprint="other"), None)
    with pytest.raises(pytest.fail.Exception):  # a name tells the patient
        audited(config, replace(data, manifest=data.manifest.assign(group="one")), None)


def test_strict_turns_a_leak_into_an_error_and_exit_code_2(
    config: TrainConfig,
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = leaky(phantoms, tmp_path)
    strict = replace(config, data_dir=str(folder), strict=True)
    with pytest.raises(UserError, match=r"leaks across splits .*IM-9999-0001"):
        audited(strict, read_data(strict), None)
    assert run_main(monkeypatch, "data", "audit", str(folder), "--strict") == 2
    assert run_main(monkeypatch, "data", "audit", str(folder)) == 0
    assert "WARN identical files in more than one split" in capsys.readouterr().out
    assert audited(replace(strict, data_dir=str(phantoms)), read_data(config), None)


def test_a_run_logs_its_audit(finished: tuple[TrainConfig, RunResult, mlflow.entities.Run]) -> None:
    run = finished[2]
    audit = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/data/audit.txt")
    assert "shift between splits" in audit
    assert "ok   near duplicates in more than one split: none" in audit
    assert run.data.tags["audit"]


def test_explain_writes_heat_maps(
    finished: tuple[TrainConfig, RunResult, mlflow.entities.Run],
    in_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = Path(finished[0].data_dir) / finished[1].test.table["path"][0]
    assert run_main(monkeypatch, "explain", str(image), "--out", str(tmp_path / "out")) == 0
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".png"]
    assert run_main(monkeypatch, "explain", str(tmp_path / "gone.png"), "--out", str(tmp_path / "none")) == 2
    assert not (tmp_path / "none").exists()


def test_an_external_set_on_which_the_model_fails_gets_a_warning(
    finished: tuple[TrainConfig, RunResult, mlflow.entities.Run],
    in_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The labels of the external set are swapped, so that a good ranking becomes a bad one."""
    source = Path(finished[0].data_dir) / "test"
    shutil.copytree(source / "NORMAL", tmp_path / "other" / "PNEUMONIA")
    shutil.copytree(source / "PNEUMONIA", tmp_path / "other" / "NORMAL")
    arguments = ["evaluate", "--data-dir", str(tmp_path / "other"), "--bootstrap", "200"]
    assert run_main(monkeypatch, *arguments) == 0
    newest = mlflow.search_runs(experiment_names=["cxr"], order_by=["start_time DESC"], output_format="list")[0]
    drop, own = newest.data.metrics["external_auc_drop"], finished[1].test.values["roc_auc"]
    assert drop == pytest.approx(own - (1 - own))
    assert newest.data.metrics["external_auc_drop_low"] < drop < newest.data.metrics["external_auc_drop_high"]
    said = capsys.readouterr().out
    assert ("WARNING: the model discriminates worse here" in said) == (newest.data.metrics["external_auc_drop_low"] > 0)
    assert "share of each class" in said
    assert "patients that the model was trained" not in said
    shutil.copytree(source.parent / "train" / "NORMAL", tmp_path / "other" / "NORMAL", dirs_exist_ok=True)
    assert run_main(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "WARNING: 10 of 22 images are of patients that the model was trained" in said
    assert "WARNING: 10 of 22 images are files that the model was trained" in said
    assert run_main(monkeypatch, *arguments) == 0
    assert "these images were evaluated 1 times before in this store" in capsys.readouterr().out
    assert "external_ece" in newest.data.metrics
    assert "external_prior_estimated" in LoggedRun.of(newest).every_metric()
