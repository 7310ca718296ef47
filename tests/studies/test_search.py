"""Searches on tiny phantoms: the states in Optuna and MLflow after every way in which a trial can end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pytest
import torch
from command import run_main
from mlflow.entities import Run
from optuna.trial import TrialState
from postgres import Postgres, programs
from small import quiet, small
from started import Started

from cxr.config import TuneConfig
from cxr.errors import MachineError, UserError
from cxr.runs import train as pipeline
from cxr.studies import optuna_study as study
from cxr.studies import patient_storage, search, trial_queue
from cxr.studies import trial as trial_module
from cxr.studies.optuna_study import slots
from cxr.studies.patient_storage import PatientStorage
from cxr.studies.search import open_worker, tune_tracked
from cxr.tracking import nested
from cxr.tracking.lifecycle import this_process
from cxr.tracking.nested import children, make_child
from cxr.tracking.reading import LoggedRun, Tag

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


@pytest.fixture
def config(in_store: str, phantoms: Path, tmp_path: Path) -> TuneConfig:
    """A search that takes seconds."""
    return small(
        TuneConfig,
        phantoms,
        strategy="frozen",
        epochs=2,
        register="none",
        trials=3,
        pruner="NopPruner",
        storage=f"sqlite:///{tmp_path / 'optuna.db'}",
        refit=False,
        heartbeat=1,
    )


OPENED: list[optuna.storages.RDBStorage] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close connections: psycopg warns about those left to the garbage collector."""
    yield
    for storage in OPENED:
        storage.remove_session()
        storage.engine.dispose()
    OPENED.clear()


def load(config: TuneConfig) -> optuna.Study:
    OPENED.append(optuna.storages.RDBStorage(config.storage))
    return optuna.load_study(study_name=study.study_name(config), storage=OPENED[-1])


def family(config: TuneConfig) -> tuple[Run, list[Run]]:
    """(parent, children) in MLflow."""
    parent = LoggedRun.open(load(config).user_attrs["mlflow_parent"])
    return parent, children(parent.run_id)


def states(config: TuneConfig) -> list[str]:
    return [trial.state.name for trial in load(config).trials]


def test_a_search_has_one_parent_a_child_for_each_trial_and_the_weights_of_the_best_only(
    config: TuneConfig, studies_save: None
) -> None:
    tune_tracked(config, quiet)
    parent, runs = family(config)
    found = load(config)
    assert states(config) == ["COMPLETE"] * 3
    assert found.trials[0].params == {"lr_head": config.train.lr_head}
    assert [run.name for run in runs] == ["trial-000", "trial-001", "trial-002"]
    assert {run.status for run in [parent, *runs]} == {"FINISHED"}
    assert parent.tags["best_trial"] == str(found.best_trial.number)
    assert float(parent.tags["best.lr_head"]) == found.best_params["lr_head"]
    for run, trial in zip(runs, found.trials, strict=True):
        assert run.params["train.lr_head"] == str(trial.params["lr_head"])
        kept = list(Path(run.artifact_uri).glob("**/*.safetensors"))
        assert len(kept) == (trial.number == found.best_trial.number)
        history = mlflow.MlflowClient().get_metric_history(run.run_id, "val_loss")
        assert min(entry.value for entry in history) == trial.value
    names = {path.path for path in mlflow.MlflowClient().list_artifacts(parent.run_id, "search")}
    assert {"search/trials.csv", "search/history.png", "search/slice.png", "search/best.json"} <= names


def test_a_search_is_repeatable(config: TuneConfig, tmp_path: Path) -> None:
    tune_tracked(config, quiet)
    other = config.replace(storage=f"sqlite:///{tmp_path / 'other.db'}")
    tune_tracked(other, quiet)
    assert [t.params for t in load(config).trials] == [t.params for t in load(other).trials]
    assert [t.value for t in load(config).trials] == [t.value for t in load(other).trials]


def test_a_search_never_uses_the_test_split(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch, phantoms: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    made = pipeline.make_split

    def spied(manifest: Any, store: Any, name: str) -> Any:
        seen.append(name)
        assert set(manifest["split"]) == {"train", "val"}
        return made(manifest, store, name)

    monkeypatch.setattr("cxr.runs.train.make_split", spied)
    tune_tracked(config, quiet)
    assert set(seen) == {"train", "val"}
    swapped = Path(shutil.copytree(phantoms, tmp_path / "swapped"))  # every label of the test split is wrong
    (swapped / "test" / "NORMAL").rename(swapped / "test" / "was")
    (swapped / "test" / "PNEUMONIA").rename(swapped / "test" / "NORMAL")
    (swapped / "test" / "was").rename(swapped / "test" / "PNEUMONIA")
    other = config.replace(data_dir=str(swapped), storage=f"sqlite:///{tmp_path / 'other.db'}")
    tune_tracked(other, quiet)
    assert [t.value for t in load(config).trials] == [t.value for t in load(other).trials]


def test_more_trials_continue_the_same_study_and_parent(config: TuneConfig) -> None:
    tune_tracked(config, quiet)
    before = family(config)[0].run_id
    tune_tracked(config.replace(trials=5), quiet)
    parent, runs = family(config)
    assert (parent.run_id, len(runs), states(config)) == (before, 5, ["COMPLETE"] * 5)
    assert len({trial.params["lr_head"] for trial in load(config).trials}) == 5
    tune_tracked(config.replace(trials=5), quiet)
    assert len(family(config)[1]) == 5


def test_each_call_adds_a_step_to_the_counts_of_the_search(config: TuneConfig) -> None:
    for trials in (1, 2):
        tune_tracked(config.replace(trials=trials), quiet)
    history = mlflow.MlflowClient().get_metric_history(family(config)[0].run_id, "trials_complete")
    assert [(each.step, each.value) for each in history] == [(0, 1), (1, 2)]


def test_the_parent_of_a_worker_that_was_killed_is_the_parent_of_the_study(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    schedule = nested._schedule

    def stopped(*arguments: Any) -> str:
        made.append(schedule(*arguments))
        raise KeyboardInterrupt  # before the study knows it

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nested, "_schedule", stopped)
        tune_tracked(config, quiet)
    tune_tracked(config, quiet)
    assert [family(config)[0].run_id] == made


def test_a_study_with_other_parameters_is_not_continued(config: TuneConfig) -> None:
    tune_tracked(config.replace(trials=1), quiet)
    with pytest.raises(UserError, match=r"other parameters: epochs was 2.*--study"):
        tune_tracked(config.replace(epochs=3), quiet)
    with pytest.raises(UserError, match="--resume nothing: no such study"):
        tune_tracked(config.replace(resume="nothing"), quiet)
    tune_tracked(config.replace(resume="tune-frozen", trials=2, reuse_gb=0), quiet)
    assert states(config) == ["COMPLETE"] * 2


def test_a_pruned_trial_is_pruned_in_optuna_and_killed_in_mlflow(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number == 1)
    tune_tracked(config, quiet)
    assert states(config) == ["COMPLETE", "PRUNED", "COMPLETE"]
    child = family(config)[1][1]
    assert child.status == "KILLED"
    assert child.tags["cxr.error"].startswith("pruned by NopPruner at epoch 0: val_loss")
    assert len(load(config).trials[1].intermediate_values) == 1


def test_steps_continue_across_phases(config: TuneConfig) -> None:
    gradual = config.replace(strategy="gradual", trials=1)
    tune_tracked(gradual, quiet)
    (trial,) = load(gradual).trials
    assert list(trial.intermediate_values) == list(range(6))
    assert set(trial.params) == {"lr_head", "lr_top", "lr_all"}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("training diverged"), "UserError: training diverged"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; lower --batch-size"),
        (ZeroDivisionError("by nothing"), "ZeroDivisionError: by nothing"),
    ],
)
def test_a_trial_that_raises_is_marked_failed_and_the_search_continues(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    train = trial_module.train_model

    def fails_once(*arguments: Any) -> Any:
        if arguments[1].recorded_tags().get("mlflow.runName") == "trial-001":
            raise error
        return train(*arguments)

    monkeypatch.setattr(trial_module, "train_model", fails_once)
    tune_tracked(config, quiet)
    assert states(config) == ["COMPLETE", "FAIL", "COMPLETE"]
    child = family(config)[1][1]
    assert child.status == "FAILED"
    assert says in child.tags["cxr.error"]
    assert says in load(config).trials[1].user_attrs["error"]


def full_disk(*arguments: Any) -> Any:
    raise MachineError("disk full")


def test_the_trial_with_the_defaults_is_named_when_it_was_tried_again(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, pytest.raises(MachineError, match="disk full"):
        broken.setattr(trial_module, "train_model", full_disk)
        tune_tracked(config.replace(trials=1), quiet)
    lines: list[str] = []
    tune_tracked(config.replace(trials=2), lines.append)
    retried = next(trial for trial in load(config).trials if trial.system_attrs.get("failed_trial") == 0)
    assert f"the defaults (trial {retried.number}): val_loss {retried.value:.4f}" in "\n".join(lines)


def test_a_lost_store_or_a_full_disk_ends_the_search_without_losing_a_trial(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trial_module.train_model

    def full(*arguments: Any) -> Any:
        if arguments[1].recorded_tags().get("mlflow.runName") == "trial-001":
            raise MachineError("disk full")
        return train(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(trial_module, "train_model", full)
        with pytest.raises(MachineError, match="disk full"):
            tune_tracked(config, quiet)
    assert [trial.state.name for trial in slots(load(config))] == ["COMPLETE", "WAITING", "WAITING"]
    assert family(config)[0].status == "FAILED"
    tune_tracked(config, quiet)
    assert [trial.state.name for trial in slots(load(config))] == ["COMPLETE"] * 3
    assert "cxr.error" not in family(config)[0].tags


def test_a_trial_that_could_not_be_queued_again_on_a_full_disk_is_when_there_is_space(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken, pytest.raises(MachineError, match="disk full"):
        broken.setattr(trial_module, "train_model", full_disk)
        broken.setattr(trial_queue, "requeue", full_disk)
        tune_tracked(config.replace(trials=2), quiet)
    assert states(config)[0] == "FAIL"
    tune_tracked(config.replace(trials=2), quiet)
    assert [trial.state.name for trial in slots(load(config))] == ["COMPLETE"] * 2


def test_a_study_is_not_continued_on_other_data_or_weights(config: TuneConfig, phantoms: Path, tmp_path: Path) -> None:
    tune_tracked(config.replace(trials=1), quiet)
    moved = Path(shutil.copytree(phantoms, tmp_path / "moved"))
    tune_tracked(config.replace(trials=2, data_dir=str(moved)), quiet)  # the same images elsewhere
    next((moved / "train" / "NORMAL").iterdir()).unlink()
    with pytest.raises(UserError, match="other parameters: data was"):
        tune_tracked(config.replace(trials=3, data_dir=str(moved)), quiet)


def test_the_value_is_that_of_the_best_epoch(config: TuneConfig) -> None:
    judged = config.replace(objective="val_roc_auc", epochs=4, trials=1, strategy="partial")
    tune_tracked(judged, quiet)
    (trial,) = load(judged).trials
    child = family(judged)[1][0]
    history = {
        name: [entry.value for entry in mlflow.MlflowClient().get_metric_history(child.run_id, name)]
        for name in ("val_loss", "val_roc_auc")
    }
    assert trial.value == history["val_roc_auc"][int(np.argmin(history["val_loss"]))]


def test_a_search_whose_first_trials_all_fail_stops_with_the_reason(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise UserError("no good")

    monkeypatch.setattr(trial_module, "train_model", fails)
    with pytest.raises(UserError, match="first 3 trials all failed, the last with: UserError: no good"):
        tune_tracked(config.replace(trials=10), quiet)
    assert family(config)[0].status == "FAILED"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_after_the_trial_or_immediately_if_repeated_and_the_study_continues(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch, presses: int
) -> None:
    train, pressed = trial_module.train_model, []

    def pressing(*arguments: Any) -> Any:
        if arguments[1].recorded_tags().get("mlflow.runName") == "trial-001" and not pressed:
            for _ in range(presses):
                pressed.append(signal.raise_signal(signal.SIGINT))
        return train(*arguments)

    monkeypatch.setattr(trial_module, "train_model", pressing)
    with pytest.raises(KeyboardInterrupt):
        tune_tracked(config, quiet)
    assert states(config) == [
        "COMPLETE",
        *(["COMPLETE", "WAITING"] if presses == 1 else ["FAIL", "WAITING", "WAITING"]),
    ]
    parent, runs = family(config)
    assert parent.status == "KILLED"
    assert [run.status for run in runs] == ["FINISHED", "FINISHED" if presses == 1 else "KILLED"]
    tune_tracked(config, quiet)
    assert [trial.state.name for trial in slots(load(config))] == ["COMPLETE"] * 3
    assert family(config)[0].status == "FINISHED"


def test_the_refit_reproduces_the_best_trial_and_runs_only_once(config: TuneConfig) -> None:
    refitting = config.replace(refit=True, trials=2)
    result = tune_tracked(refitting, quiet)
    assert result is not None
    assert result.best.metrics["val_loss"] == load(config).best_value
    assert LoggedRun.open(result.run_id).params["train.lr_head"] == str(load(config).best_params["lr_head"])
    assert tune_tracked(refitting, quiet) is None
    refits = [run for run in family(config)[1] if run.tags.get("cxr.kind") == "refit"]
    assert [run.status for run in refits] == ["FINISHED"]


def test_an_interrupted_refit_is_resumed(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    refitting = config.replace(refit=True, trials=1)
    with monkeypatch.context() as broken:
        broken.setattr("cxr.runs.train.log_end", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune_tracked(refitting, quiet)
    result = tune_tracked(refitting, quiet)
    assert result is not None
    refits = [run for run in family(config)[1] if run.tags.get("cxr.kind") == "refit"]
    assert [(run.run_id, run.status) for run in refits] == [(result.run_id, "FINISHED")]


def test_a_refit_that_was_made_and_not_claimed_is_taken(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    refitting = config.replace(refit=True, trials=1, seed=7)

    def stopped(*arguments: Any) -> str:
        make_child(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(search, "make_child", stopped)
        tune_tracked(refitting, quiet)
    tune_tracked(refitting, quiet)
    refits = [run for run in family(refitting)[1] if run.tags.get("cxr.kind") == "refit"]
    assert [run.status for run in refits] == ["FINISHED"]


def test_a_trial_whose_process_was_killed_is_ended_by_the_same_command(config: TuneConfig) -> None:
    once = config.replace(trials=1, seed=8)
    tune_tracked(once, quiet)
    parent = family(once)[0].run_id
    tags = {
        Tag.PARENT: parent,
        Tag.HOST: socket.gethostname(),
        Tag.PROCESS: f"{2**22 + 1} 0 {this_process().split()[2]}",
    }
    client = mlflow.MlflowClient()
    lost = client.create_run(mlflow.get_run(parent).info.experiment_id, tags=tags).info.run_id
    tune_tracked(once.replace(trials=2), quiet)
    assert client.get_run(lost).info.status == "KILLED"


def test_no_worker_is_taken_for_dead_before_it_had_time_for_another_heartbeat(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_tracked(config.replace(trials=1, seed=9), quiet)
    storage, found = PatientStorage(config.storage, heartbeat_interval=1), [[1, 2], [2, 3]]
    waited: list[float] = []
    monkeypatch.setattr(patient_storage.time, "sleep", waited.append)
    monkeypatch.setattr(PatientStorage, "_stale", lambda self, study: found.pop(0))
    assert storage._get_stale_trial_ids(0) == [2]
    assert len(waited) == 1
    assert waited[0] > 1
    storage.engine.dispose()


def test_seeds_are_averaged(config: TuneConfig) -> None:
    averaged = config.replace(seeds=2, trials=1, pruner="WilcoxonPruner")
    tune_tracked(averaged, quiet)
    (trial,) = load(averaged).trials
    assert list(trial.intermediate_values) == [0, 1]
    assert trial.value == pytest.approx(np.mean(list(trial.intermediate_values.values())))
    metrics = family(averaged)[1][0].metrics
    assert metrics["seed1_val_loss"] != metrics["val_loss"]


@pytest.mark.parametrize("pruner", ["MedianPruner", "HyperbandPruner", "SuccessiveHalvingPruner"])
def test_pruners_run_by_their_names(config: TuneConfig, pruner: str) -> None:
    named = config.replace(pruner=pruner, trials=6, epochs=3)
    tune_tracked(named, quiet)
    assert set(states(named)) <= {"COMPLETE", "PRUNED"}
    assert type(study._pruner(named)).__name__ == pruner


@pytest.mark.parametrize("sampler", ["TPESampler", "RandomSampler", "QMCSampler", "GPSampler"])
def test_samplers_stay_in_range_and_search_the_chosen_parameters(config: TuneConfig, sampler: str) -> None:
    wide = config.replace(sampler=sampler, search="gamma,lr,batch_size,weight_decay", objective="val_roc_auc", epochs=1)
    tune_tracked(wide, quiet)
    for trial in load(wide).trials:
        assert set(trial.params) == {"lr_head", "weight_decay", "gamma", "batch_size"}
        assert 16 <= trial.params["batch_size"] <= 128
        assert 1e-5 <= trial.params["lr_head"] <= 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--search", "lr,momentum"), "momentum unknown"),
        (("--storage", "postgresql://nobody@127.0.0.1:9/x"), "--storage postgresql://nobody@127.0.0.1:9/x"),
        (("--storage", "nonsense"), "--storage nonsense"),
        (("--storage", "sqlite:////proc/nope/o.db"), "--storage sqlite:////proc/nope/o.db"),
        (("--resume", "nothing"), "--resume nothing: no such study"),
        (("--trials", "0"), "--trials 0: must be at least 1"),
        (("--sampler", "Best"), "--sampler Best: unknown"),
        (("--weights", "/no/file.pth"), "--weights /no/file.pth: no such file"),
    ],
)
def test_invalid_input_of_a_search_is_one_line(
    config: TuneConfig,
    options: tuple[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {
        "--data-dir": config.train.data_dir,
        "--weights": "random",
        "--storage": config.storage,
        "--image-size": "64",
    }
    given[options[0]] = options[1]
    assert run_main(monkeypatch, "tune", *[text for pair in given.items() for text in pair]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error


def start(config: TuneConfig, store: str, cache: Path) -> Started:
    """Start `cxr tune` in a new process."""
    train = config.train
    options = ["--strategy", train.strategy, "--data-dir", train.data_dir, "--arch", train.arch, "--weights", "random"]
    options += ["--image-size", "64", "--epochs", str(train.epochs), "--views", "1", "--bootstrap", "0"]
    options += ["--register", "none", "--storage", config.storage, "--heartbeat", "1", "--pruner", "NopPruner"]
    options += ["--refit", str(config.refit).lower(), "--trials", str(config.trials)]
    return Started("tune", *options, MLFLOW_TRACKING_URI=store, CXR_CACHE=str(cache))


def kill_during_trial(config: TuneConfig, process: Started, after: str) -> None:
    """Send SIGKILL while the process runs a trial, after it has printed `after`."""
    for line in process.stdout:
        if after in line:
            break
    until = time.monotonic() + 30
    while time.monotonic() < until:
        running = [t for t in load(config).trials if t.state == TrialState.RUNNING and t.intermediate_values]
        if running:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.finish()


def assert_complete(config: TuneConfig, trials: int, lost: int) -> None:
    """Every trial once; nothing RUNNING in Optuna or MLflow; a KILLED run for each lost trial."""
    found = load(config)
    assert [trial.state.name for trial in slots(found)] == ["COMPLETE"] * trials
    assert len(found.trials) == trials + lost
    parent, runs = family(config)
    assert parent.status == "FINISHED"
    outcomes = [run.status for run in runs if run.tags.get("cxr.kind") == "trial"]
    assert outcomes.count("FINISHED") == trials
    assert len(outcomes) - trials <= outcomes.count("KILLED") <= lost  # a trial may be lost before it has a run
    killed = [run for run in runs if run.status == "KILLED"]
    reasons = ("stopped sending heartbeats", "its process was killed")  # whichever is noticed first
    assert all(any(reason in run.tags["cxr.error"] for reason in reasons) for run in killed)


@pytest.mark.parametrize("status", ["RUNNING", "FINISHED"])
def test_the_run_of_a_lost_trial_is_ended_even_if_the_study_does_not_know_it(config: TuneConfig, status: str) -> None:
    worker = open_worker(config, quiet)
    with warnings.catch_warnings(action="ignore"):  # heartbeats are for `optimize`
        trial = worker.study.ask()
    run_id = make_child(worker.search.parent.run_id, f"trial-{trial.number:03}", {}, {})
    mlflow.MlflowClient().update_run(run_id, status=status)
    mlflow.MlflowClient().set_tag(run_id, Tag.OUTCOME, "finished")
    search._on_stale(worker.study, worker.study.trials[trial.number])
    run = LoggedRun.open(run_id)
    assert run.status == "KILLED"
    assert "stopped sending heartbeats" in run.tags["cxr.error"]
    assert not run.finished
    assert states(config).count("WAITING") == config.trials


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        ({"augment": "mild-1"}, {"augment": "crops-2"}, "augment was mild-1"),
        ({"augment": "crops-2"}, {"augment": "mild-1"}, "augment was crops-2"),
        ({"average": "sma"}, {"average": "none"}, "average was sma"),
    ],
)
def test_a_study_is_not_continued_with_other_values_of_younger_parameters(
    config: TuneConfig, first: dict[str, str], then: dict[str, str], says: str
) -> None:
    tune_tracked(config.replace(trials=1, refit=False, **first), quiet)
    with pytest.raises(UserError, match=says):
        tune_tracked(config.replace(trials=2, refit=False, **then), quiet)
    tune_tracked(config.replace(trials=2, refit=False, abstain=0.2, **first), quiet)


@pytest.mark.slow
def test_a_search_killed_during_a_trial_continues_to_exactly_its_number_of_trials(
    config: TuneConfig, store: str, own_cache: Path
) -> None:
    long = config.replace(strategy="full", trials=4, epochs=3)
    kill_during_trial(long, start(long, store, own_cache), "trial   0")
    assert "RUNNING" in states(long)
    code, output = start(long, store, own_cache).finish()
    assert code == 0, output
    assert_complete(long, 4, lost=1)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of an empty database on a new server. Needs the PostgreSQL binaries, which .ci/run installs."""
    found = programs()
    if found is None and "CI" not in os.environ:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    assert found, "PostgreSQL is not installed"
    server = Postgres(found, "-c fsync=off")
    try:
        yield f"{server.url}/postgres"
    finally:
        server.remove()


@pytest.mark.slow
def test_two_workers_share_a_study_and_the_trial_of_a_dead_one_is_not_lost(
    config: TuneConfig, store: str, own_cache: Path, postgres: str
) -> None:
    shared = config.replace(strategy="full", trials=12, epochs=1, storage=postgres)
    first = start(shared, store, own_cache)
    second = start(shared, store, own_cache)
    kill_during_trial(shared, first, "trial ")
    code, output = second.finish()
    assert code == 0, output
    lost = len(load(shared).trials) - 12
    assert lost in (0, 1)  # none where the kill fell between two trials
    assert_complete(shared, 12, lost)
    assert len({trial.params["lr_all"] for trial in slots(load(shared))}) == 12
