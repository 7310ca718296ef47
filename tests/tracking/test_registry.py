"""The registry, and use of a registered model."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from command import run_main
from mlflow.entities import Run
from small import quiet, small
from started import Started
from torchvision.models import ResNet, resnet18

from cxr.config import TrainConfig
from cxr.errors import UserError
from cxr.runs.record import _require_same
from cxr.runs.result import RunResult
from cxr.runs.train import run_tracked
from cxr.storage import Cache
from cxr.tracking import registry
from cxr.tracking.reading import metric_history
from cxr.tracking.tracker import MlflowTracker
from cxr.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
CHAMPION = "models:/cxr-pneumonia@champion"
Finished = tuple[TrainConfig, RunResult, Run]


def image_of(finished: Finished, row: int = 0) -> Path:
    """A test image of the finished run."""
    return Path(finished[0].data_dir) / finished[1].test.table["path"][row]


def test_a_finished_run_becomes_a_complete_version(finished: Finished, in_store: str) -> None:
    _, result, logged = finished
    assert "version 1 (candidate); champion (first version)" in logged.data.tags["registered"]
    version = mlflow.MlflowClient().get_model_version("cxr-pneumonia", "1")
    assert version.run_id == result.run_id
    assert json.loads(version.tags["class_to_index"]) == {"NORMAL": 0, "PNEUMONIA": 1}
    assert float(version.tags["val_loss"]) == result.best.metrics["val_loss"]
    wanted = {"strategy", "threshold", "preprocessing", "data_fingerprint", "val_fingerprint", "augment"}
    assert wanted <= version.tags.keys()


@pytest.mark.parametrize("shape", ["bytes", "base64", "array", "list of bytes", "list of base64"])
def test_the_champion_accepts_images_in_every_documented_form(finished: Finished, in_store: str, shape: str) -> None:
    from PIL import Image

    data = image_of(finished).read_bytes()
    inputs = {
        "bytes": pd.DataFrame({"image": [data]}),
        "base64": pd.DataFrame({"image": [base64.b64encode(data).decode()]}),
        "array": pd.DataFrame({"image": [np.asarray(Image.open(image_of(finished)))]}),
        "list of bytes": [data, data],
        "list of base64": [base64.b64encode(data).decode()],
    }
    answer = mlflow.pyfunc.load_model(CHAMPION).predict(inputs[shape])
    assert list(answer.columns) == ["label", "probability", "decision", "familiarity", "abstain"]
    expected = finished[1].test.table["probability"][0]
    assert answer["probability"].to_numpy() == pytest.approx(np.full(len(answer), expected), abs=1e-5)


def test_the_plain_torchvision_module_is_available(finished: Finished, in_store: str) -> None:
    network = mlflow.pyfunc.load_model(CHAMPION).unwrap_python_model().network()
    assert type(network) is ResNet
    assert not network.training
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.slow
def test_the_champion_loads_where_cxr_is_not_importable(finished: Finished, in_store: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__name__", type(f).__name__).lower()]
import importlib.util
assert importlib.util.find_spec("cxr") is None
import mlflow, pandas
model = mlflow.pyfunc.load_model({CHAMPION!r})
print(model.predict(pandas.DataFrame({{"image": [open({str(image_of(finished))!r}, "rb").read()]}}))["probability"][0])
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout.split()[-1]) == pytest.approx(finished[1].test.table["probability"][0], abs=1e-5)


def test_predict_prints_the_predictions_of_the_run(
    finished: Finished, in_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "predict", str(image_of(finished)), str(image_of(finished, 1)), "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    table = finished[1].test.table
    assert [line["probability"] for line in lines] == pytest.approx(list(table["probability"][:2]), abs=1e-5)


def test_predict_names_every_bad_file(
    finished: Finished,
    in_store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "text.jpeg").write_text("no image")
    assert run_main(monkeypatch, "predict", str(tmp_path / "text.jpeg"), str(tmp_path / "gone.png")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "text.jpeg (not a JPEG, PNG or DICOM file)" in error
    assert "gone.png (No such file" in error


def test_the_accuracy_on_images_without_labels_is_estimated_and_said_to_be_an_estimate(
    finished: Finished,
    in_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, result, _ = finished
    files = sorted(Path(config.data_dir).glob("test/*/*"))
    folder = tmp_path / "films"
    folder.mkdir()
    for file in files:
        shutil.copy(file, folder / file.name)
    assert run_main(monkeypatch, "evaluate", "--data-dir", str(folder), "--bootstrap", "50") == 0
    said = capsys.readouterr().out
    assert f"{len(files)} images without labels" in said
    assert "an estimate made on unlabelled images" in said
    run = mlflow.search_runs(search_all_experiments=True, order_by=["start_time DESC"], output_format="list")[0]
    metrics = run.data.metrics
    assert 0 <= metrics["estimated_accuracy_low"] <= metrics["estimated_accuracy"] <= metrics["estimated_accuracy_high"]
    assert metrics["unlabelled_unfamiliar"] == pytest.approx(result.test.selective["unfamiliar"])
    assert not [name for name in metrics if name.startswith(("test_", "external_"))]
    assert "test_split" not in run.data.tags


def test_evaluate_reproduces_the_test_metrics_and_calls_a_flat_folder_external(
    finished: Finished, in_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, result, _ = finished
    assert run_main(monkeypatch, "evaluate", "--data-dir", config.data_dir, "--bootstrap", "0") == 0
    assert f"roc_auc                   {result.test.values['roc_auc']:.4f}" in capsys.readouterr().out
    assert run_main(monkeypatch, "evaluate", "--data-dir", f"{config.data_dir}/test", "--bootstrap", "0") == 0
    assert capsys.readouterr().out.startswith("external: ")
    newest = mlflow.search_runs(experiment_names=["cxr"], order_by=["start_time DESC"], output_format="list")[0]
    assert newest.data.metrics["external_roc_auc"] == pytest.approx(result.test.values["roc_auc"])


def test_export_writes_a_plain_torchvision_state_dict(
    finished: Finished, in_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "models", "export", str(tmp_path)) == 0
    model = resnet18(weights=None, num_classes=2)
    model.load_state_dict(torch.load(tmp_path / "X_ray_classifier.pth", weights_only=True))
    assert json.loads((tmp_path / "class_to_index.json").read_text()) == {"NORMAL": 0, "PNEUMONIA": 1}


def test_champion_moves_only_when_validation_on_the_same_images_improves(finished: Finished, in_store: str) -> None:
    client, made, outcomes = mlflow.MlflowClient(), [], []
    for number, (loss, images) in enumerate([("0.5", "x"), ("0.6", "x"), ("0.1", "y"), ("0.4", "x")]):
        model = mlflow.initialize_logged_model(name="empty", experiment_id=finished[2].info.experiment_id)
        mlflow.finalize_logged_model(model.model_id, "READY")
        tags = {"run_id": str(number), "val_loss": loss, "val_fingerprint": images}
        made.append((model.model_id, tags))
        outcomes.append(registry.register(model.model_id, "moving", tags))
        assert client.get_model_version_by_alias("moving", "candidate").version == int(outcomes[-1].version)
    assert [outcome.champion for outcome in outcomes] == [True, False, False, True]
    assert "not higher than 0.6" in outcomes[1].why
    assert "different images" in outcomes[2].why
    assert client.get_model_version_by_alias("moving", "champion").tags["champion_before"] == "1"
    again = registry.register(made[-1][0], "moving", made[-1][1])
    assert (again.version, again.champion) == (outcomes[-1].version, True)
    assert list(registry.versions("moving")["version"]) == [4, 3, 2, 1]


def test_a_model_of_other_classes_does_not_become_champion(finished: Finished, in_store: str) -> None:
    outcomes = []
    for number, classes in enumerate(['{"A": 0, "B": 1}', '{"B": 0, "A": 1}', '{"A": 0, "B": 1}']):
        model = mlflow.initialize_logged_model(name="empty", experiment_id=finished[2].info.experiment_id)
        mlflow.finalize_logged_model(model.model_id, "READY")
        tags = {"run_id": str(number), "val_loss": f"0.{5 - number}", "val_fingerprint": "x", "class_to_index": classes}
        outcomes.append(registry.register(model.model_id, "classes", tags))
    assert [outcome.champion for outcome in outcomes] == [True, False, True]
    assert "has other classes" in outcomes[1].why


def test_a_model_trained_on_views_of_another_recipe_does_not_become_champion(finished: Finished, in_store: str) -> None:
    outcomes = []
    recipes = [None, "crops-2", "mild-1", "crops-2", None]  # None: of a version that did not say
    for number, recipe in enumerate(recipes):
        model = mlflow.initialize_logged_model(name="empty", experiment_id=finished[2].info.experiment_id)
        mlflow.finalize_logged_model(model.model_id, "READY")
        tags = {"run_id": str(number), "val_loss": f"0.{9 - number}", "val_fingerprint": "x"}
        outcomes.append(registry.register(model.model_id, "views", tags | ({"augment": recipe} if recipe else {})))
    assert [outcome.champion for outcome in outcomes] == [True, True, False, True, True]
    assert "version 2 remains champion: it was trained with augment=crops-2, not mild-1" in outcomes[2].why


PHANTOMS = "synthetic phantoms (NOT real X-rays)"  # as version 0.1 wrote it


def test_a_champion_trained_on_phantoms_is_replaced_by_any_model_trained_on_xrays(
    finished: Finished, in_store: str
) -> None:
    outcomes = []
    for number, (data, images) in enumerate([(PHANTOMS, "x"), ("X-rays", "y"), (PHANTOMS, "z")]):
        model = mlflow.initialize_logged_model(name="empty", experiment_id=finished[2].info.experiment_id)
        mlflow.finalize_logged_model(model.model_id, "READY")
        tags = {"run_id": str(number), "val_loss": "0.5", "val_fingerprint": images, "data": data}
        outcomes.append(registry.register(model.model_id, "replacing", tags))
    assert [outcome.champion for outcome in outcomes] == [True, True, False]
    assert "trained on phantoms only" in outcomes[1].why


def test_unknown_models_and_runs_are_user_errors(
    finished: Finished, in_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ("predict", "x.png", "--model", "models:/nothing@champion"),
        ("models", "promote", "99"),
        ("models", "list", "--name", "nothing"),
        ("train", "--resume", "0" * 32),
        ("train", "--resume", finished[1].run_id),
    ):
        assert run_main(monkeypatch, *command) == 2, command
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


def test_an_invalid_registry_name_is_rejected() -> None:
    with pytest.raises(UserError, match="--register"):
        TrainConfig(register="a/b")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result_without_a_duplicate_step(
    store: str, phantoms: Path, in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(TrainConfig, phantoms, strategy="gradual", epochs=2)
    options = ["--arch", config.arch, "--strategy", "gradual", "--data-dir", str(phantoms), "--weights", "random"]
    options += ["--image-size", "64", "--epochs", "2", "--views", "1", "--bootstrap", "0"]
    process = Started("train", *options)
    for line in process.stdout:
        if line.startswith("epoch  2"):
            process.send_signal(signal.SIGKILL)
    code, _ = process.finish()
    assert code == -signal.SIGKILL
    killed = mlflow.search_runs(experiment_names=["cxr"], order_by=["start_time DESC"], output_format="list")[0]
    assert killed.info.status == "RUNNING"
    left = Cache.open().outbox(killed.info.run_id).glob("*.json")  # logged, and not yet delivered
    before = len(mlflow.MlflowClient().get_metric_history(killed.info.run_id, "val_loss"))
    before += sum('"val_loss"' in path.read_text() for path in left)
    with monkeypatch.context() as patch:
        patch.setattr(
            "cxr.runs.train.time", SimpleNamespace(perf_counter=float)
        )  # no time passes: the killed one's counts
        resumed = run_tracked(TrainConfig(), run_id=killed.info.run_id, say=lambda line: None)
    assert resumed.run_id == killed.info.run_id
    history = mlflow.MlflowClient().get_metric_history(resumed.run_id, "val_loss")
    whole = run_tracked(config, say=lambda line: None)
    assert [entry.step for entry in history] == list(range(len(whole.records)))
    assert [entry.value for entry in history] == list(whole.history["val_loss"])
    assert np.array_equal(resumed.test.probabilities, whole.test.probabilities)
    assert mlflow.get_run(resumed.run_id).info.status == "FINISHED"
    restored = sum(record.restored for record in resumed.records)
    assert before - 1 <= restored <= before  # the last one's checkpoint was under way
    spent = resumed.history.loc[: restored - 1, ["epoch_seconds", "eval_seconds"]].to_numpy().sum()
    assert resumed.seconds == pytest.approx(spent)


def test_an_epoch_logged_but_not_saved_is_trained_again_and_logged_if_different(
    phantoms: Path, in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(TrainConfig, phantoms, strategy="frozen", epochs=3, register="none")
    calls, whole = itertools.count(), Checkpoints._write

    def write(self: Checkpoints, file: Callable[[], object]) -> None:
        if next(calls) < 3:  # the network at the start, the best so far, the first state
            whole(self, file)

    def stop(line: str) -> None:
        if line.startswith("epoch  1"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "_write", write)
        run_tracked(config, say=stop)
    run_id = mlflow.search_runs(experiment_names=["cxr"], order_by=["start_time DESC"])["run_id"][0]
    mlflow.MlflowClient().log_metric(run_id, "val_loss", 0.125, step=1)  # as another machine would have measured it
    resumed = run_tracked(TrainConfig(), run_id=run_id, say=quiet)
    assert [record.restored for record in resumed.records] == [True, False, False]
    with pytest.raises(UserError, match="precision was fp32, now bf16"):
        _require_same(MlflowTracker(mlflow.get_run(run_id)), {"precision": "bf16"})
    assert list(metric_history(run_id, "val_loss").values()) == list(resumed.history["val_loss"])
