"""Runs in a real MLflow store (SQLite)."""

from __future__ import annotations

import errno
import signal
import socket
import time
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Run
from narrow import ARCH
from started import Started

from cxr.config import TrainConfig, flatten, unflatten
from cxr.errors import InUseError, MachineError, UserError
from cxr.runs.result import RunResult
from cxr.runs.resume import remove_finished
from cxr.runs.train import run_tracked
from cxr.storage import exclusive
from cxr.tracking import registry
from cxr.tracking.lifecycle import existing_run, open_run, this_process
from cxr.tracking.reading import LoggedRun
from cxr.tracking.store import one_at_a_time
from cxr.tracking.tracker import MlflowTracker


def test_a_finished_run_has_its_tags(finished: tuple[TrainConfig, RunResult, Run]) -> None:
    config, _, logged = finished
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "gradual-s0"
    assert unflatten(logged.data.params) == config
    tags = logged.data.tags
    assert {"strategy", "seed", "data_fingerprint", "weights_used", "device", "git_commit", "freezing"} <= tags.keys()
    assert "test, threshold 0.5" in tags["mlflow.note.content"]
    experiment = mlflow.get_experiment(logged.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_checkpoints_of_a_finished_run_are_removed(finished: tuple[TrainConfig, RunResult, Run]) -> None:
    assert not list((Path(finished[0].cache_dir) / "runs").iterdir())


def test_each_epoch_is_logged_once_with_consecutive_steps(finished: tuple[TrainConfig, RunResult, Run]) -> None:
    _, result, _ = finished
    history = mlflow.MlflowClient().get_metric_history(result.run_id, "val_loss")
    assert [entry.step for entry in history] == [0, 1, 2]
    assert [entry.value for entry in history] == list(result.history["val_loss"])


def artifacts(run_id: str, folder: str = "") -> set[str]:
    """Every artifact path of a run."""
    found: set[str] = set()
    for item in mlflow.MlflowClient().list_artifacts(run_id, folder):
        found |= artifacts(run_id, item.path) if item.is_dir else {item.path}
    return found


def test_artifacts_are_complete(finished: tuple[TrainConfig, RunResult, Run]) -> None:
    _, result, _ = finished
    kinds = ("confusion_matrix", "roc", "pr", "reliability", "metrics")
    wanted = {f"plots/{split}_{kind}.png" for split in ("val", "test") for kind in kinds}
    wanted |= {"plots/learning_curves.png", "plots/train_views.png", "config.json", "freeze_proofs.json"}
    wanted |= {"tables/history.csv", "tables/val_predictions.csv", "tables/test_predictions.csv"}
    wanted |= {"data/manifest.csv", "data/audit.txt", "reports/val.txt", "reports/test.txt"}
    assert wanted <= artifacts(result.run_id)


def test_metrics_can_be_recomputed_from_the_predictions(finished: tuple[TrainConfig, RunResult, Run]) -> None:
    from cxr.evaluation.report import evaluate

    config, result, logged = finished
    file = mlflow.artifacts.download_artifacts(run_id=result.run_id, artifact_path="tables/test_predictions.csv")
    again = evaluate(pd.read_csv(file), "test", result.test.threshold, config.bootstrap).metrics()
    assert len(again) > 30
    recorded = LoggedRun.of(logged).every_metric()
    for name, value in again.items():
        assert recorded[name] == pytest.approx(value, abs=1e-12), name


def test_data_is_logged_as_inputs(finished: tuple[TrainConfig, RunResult, Run]) -> None:
    contexts = [tag.value for entry in finished[2].inputs.dataset_inputs for tag in entry.tags]
    assert sorted(contexts) == ["testing", "training", "validation"]


def test_the_logged_model_has_no_pickle_and_reproduces_the_predictions_of_the_run(
    finished: tuple[TrainConfig, RunResult, Run],
) -> None:
    config, result, _ = finished
    model = mlflow.search_logged_models(filter_string=f"source_run_id = '{result.run_id}'", output_format="list")[0]
    local = Path(mlflow.artifacts.download_artifacts(f"models:/{model.model_id}"))
    names = {path.suffix for path in local.rglob("*") if path.is_file()}
    assert not names & {".pkl", ".pickle", ".pth", ".pt", ".joblib"}
    row = result.test.table.iloc[0]
    data = (Path(config.data_dir) / row["path"]).read_bytes()
    answer = mlflow.pyfunc.load_model(f"models:/{model.model_id}").predict(pd.DataFrame({"image": [data]}))
    assert answer["probability"][0] == pytest.approx(row["probability"], abs=1e-5)
    assert {metric.key for metric in model.metrics or []} >= {"test_roc_auc", "val_roc_auc"}


def test_the_run_created_by_mlflow_is_used(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_experiment("cxr")
    with mlflow.start_run() as opened:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    mlflow.MlflowClient().set_terminated(opened.info.run_id, "RUNNING")
    run_id = existing_run(None)
    assert run_id == opened.info.run_id
    with open_run("partial-s0", run_id=run_id) as tracker:
        assert tracker.run_id == opened.info.run_id
    assert mlflow.get_run(opened.info.run_id).info.run_name == "partial-s0"


def test_a_run_name_chosen_by_the_user_is_kept(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_experiment("cxr")
    with mlflow.start_run(run_name="chest-xray-1") as opened:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", opened.info.run_id)
    with open_run("partial-s0", run_id=existing_run(None)):
        pass
    assert mlflow.get_run(opened.info.run_id).info.run_name == "chest-xray-1"


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("bad folder"), "FAILED"), (ZeroDivisionError("defect"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
)
def test_a_run_that_ends_early_records_the_reason(store: str, error: BaseException, status: str) -> None:
    runs: list[MlflowTracker] = []

    def fail() -> None:
        with open_run("partial-s0") as tracker:
            runs.append(tracker)
            raise error

    with pytest.raises(type(error)):
        fail()
    logged = mlflow.get_run(runs[0].run_id)
    assert logged.info.status == status
    assert str(error) in logged.data.tags["cxr.error"]


def test_an_unreachable_server_is_a_user_error_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"), open_run("partial-s0"):
        raise AssertionError("no run can be open")
    assert time.monotonic() - started < 30
    mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_sigterm_ends_the_run_killed(store: str, phantoms: Path, tmp_path: Path) -> None:
    options = ["--data-dir", str(phantoms), "--image-size", "64", "--arch", ARCH, "--weights", "random"]
    options += ["--strategy", "full", "--epochs", "1000", "--patience", "1000"]
    process = Started("train", *options, MLFLOW_TRACKING_URI=store)
    for line in process.stdout:
        if line.startswith("epoch"):
            process.send_signal(signal.SIGTERM)
            break
    code, _ = process.finish(60)
    assert code == 130
    mlflow.set_tracking_uri(store)
    newest = mlflow.search_runs(experiment_names=["cxr"], order_by=["start_time DESC"], output_format="list")[0]
    assert newest.info.status == "KILLED"


def test_probabilities_survive_csv(finished: tuple[TrainConfig, RunResult, Run], in_store: str) -> None:
    _, result, _ = finished
    file = mlflow.artifacts.download_artifacts(run_id=result.run_id, artifact_path="tables/test_predictions.csv")
    assert np.array_equal(pd.read_csv(file)["probability"].to_numpy(), result.test.probabilities)


def test_a_run_in_use_by_another_process_is_not_touched(store: str, phantoms: Path, own_cache: Path) -> None:
    mlflow.set_tracking_uri(store)
    with open_run("partial-s0") as tracker, exclusive(own_cache / "runs" / tracker.run_id):
        tracker.params(flatten(TrainConfig(data_dir=str(phantoms))))
        with pytest.raises(UserError, match="another process"):
            run_tracked(TrainConfig(), run_id=tracker.run_id)
        assert mlflow.get_run(tracker.run_id).info.status == "RUNNING"


def test_a_run_in_use_on_another_machine_is_not_touched(store: str, phantoms: Path) -> None:
    mlflow.set_tracking_uri(store)
    with open_run("partial-s0") as tracker:
        tracker.params(flatten(TrainConfig(data_dir=str(phantoms))))
        assert mlflow.get_run(tracker.run_id).data.tags["cxr.host"] == socket.gethostname()
        tracker.tags({"cxr.host": "elsewhere"})
        with pytest.raises(InUseError, match="is running on elsewhere"):
            run_tracked(TrainConfig(), run_id=tracker.run_id)


def test_a_run_whose_process_was_killed_is_ended_by_the_next(store: str) -> None:
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("cxr")
    pid, started, space = this_process().split()
    client, host = mlflow.MlflowClient(), socket.gethostname()
    processes = {
        "2147483646 0 " + space: "KILLED",  # such a process cannot be
        f"{pid} {float(started) - 1000} {space}": "KILLED",  # an earlier one of this number
        this_process(): "RUNNING",
        "2147483646 0 pid:[1]": "RUNNING",  # in another container
        "": "RUNNING",  # of an earlier version
    }
    experiment = mlflow.get_experiment_by_name("cxr").experiment_id
    runs = [client.create_run(experiment, tags={"cxr.host": host, "cxr.process": name}) for name in processes]
    elsewhere = client.create_run(experiment, tags={"cxr.host": "elsewhere", "cxr.process": "2147483646 0 " + space})
    try:
        with open_run("next"):
            pass
        assert [client.get_run(run.info.run_id).info.status for run in runs] == [*processes.values()]
        assert client.get_run(runs[0].info.run_id).data.tags["cxr.error"] == "its process was killed"
        assert client.get_run(elsewhere.info.run_id).info.status == "RUNNING"
    finally:
        for run in [*runs, elsewhere]:
            client.delete_run(run.info.run_id)


def test_a_run_is_known_by_its_process_from_its_first_moment(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_tracking_uri(store)
    create, tags = mlflow.MlflowClient.create_run, list[dict[str, str]]()

    def created(self: mlflow.MlflowClient, *arguments: object, **options: object) -> Run:
        run = create(self, *arguments, **options)
        tags.append(mlflow.get_run(run.info.run_id).data.tags)
        return run

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", created)
    with open_run("partial-s0"):
        pass
    assert (tags[0]["cxr.host"], tags[0]["cxr.process"]) == (socket.gethostname(), this_process())


def test_a_full_disk_during_a_run_is_one_line(store: str) -> None:
    mlflow.set_tracking_uri(store)
    with pytest.raises(MachineError, match=r"/a/file: No space left.*--resume"), open_run("partial-s0"):
        raise OSError(errno.ENOSPC, "No space left on device", "/a/file")
    with pytest.raises(OSError, match="denied"), open_run("partial-s0"):
        raise OSError(errno.EACCES, "denied")


def test_checkpoints_of_a_finished_run_that_was_killed_too_early_to_remove_them_are_removed_by_the_next(
    store: str, own_cache: Path
) -> None:
    mlflow.set_tracking_uri(store)
    with open_run("finished") as finished:
        pass
    with open_run("stopped") as unfinished:
        for name in (finished.run_id, unfinished.run_id, "unknown"):
            (own_cache / "runs" / name).mkdir(parents=True)
        remove_finished(TrainConfig())
    assert {path.name for path in (own_cache / "runs").iterdir()} == {unfinished.run_id, "unknown"}


def test_the_lock_of_a_store_may_be_held_already(store: str) -> None:
    mlflow.set_tracking_uri(store)
    with one_at_a_time(), one_at_a_time():
        pass


def test_a_resume_without_a_checkpoint_is_rejected(store: str, phantoms: Path) -> None:
    mlflow.set_tracking_uri(store)
    with pytest.raises(KeyboardInterrupt), open_run("partial-s0") as tracker:
        tracker.params(flatten(TrainConfig(data_dir=str(phantoms), image_size=64, weights="random")))
        tracker.metrics({"val_loss": 0.5}, step=0)
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="holds no checkpoint of its 1 epochs"):
        run_tracked(TrainConfig(), run_id=tracker.run_id, say=lambda line: None)


def test_a_resume_without_recorded_parameters_is_rejected(store: str) -> None:
    mlflow.set_tracking_uri(store)
    with pytest.raises(KeyboardInterrupt), open_run("partial-s0") as tracker:
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="recorded no parameters"):
        run_tracked(TrainConfig(), run_id=tracker.run_id)


def test_a_store_that_fails_while_the_run_ends_does_not_make_it_finished(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.set_tracking_uri(store)

    def broken(*arguments: object) -> None:
        raise OSError("no answer")

    with pytest.raises(ZeroDivisionError), open_run("partial-s0") as tracker:
        monkeypatch.setattr(mlflow.MlflowClient, "set_tag", broken)
        raise ZeroDivisionError
    assert mlflow.get_run(tracker.run_id).info.status == "FAILED"


@pytest.mark.parametrize("uri", ["sqlite:////proc/nope/mlflow.db", "postgresql://nobody:secret@127.0.0.1:9/x"])
def test_a_store_that_cannot_be_used_is_a_user_error(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 2)  # of 15, which take minutes
    mlflow.set_tracking_uri(uri)
    try:
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as error, open_run("partial-s0"):
            raise AssertionError("no run can be open")
        assert "secret" not in str(error.value)
        for command in (partial(registry.versions, "x"), partial(registry.promote, "x", "1")):
            with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
                command()
    finally:
        mlflow.set_tracking_uri(None)
