"""Comparisons on a Ray cluster; `experiments/ray_check.py` kills nodes and drivers."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from newest import newest_parent
from ray_workers import DEATH, ERROR, RUNTIME
from small import quiet, small

from cxr.config import CompareConfig, TrainConfig
from cxr.errors import ChildError, InUseError, MachineError, UserError
from cxr.studies import on_ray
from cxr.studies.child import Child
from cxr.studies.compare import compare_tracked
from cxr.studies.on_ray import RETRIES, _again, _connected, _require_reachable, _require_room, _settled
from cxr.tracking.nested import children
from cxr.tracking.reading import LoggedRun, Tag


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, two tasks at once."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env=RUNTIME)
    yield
    ray.shutdown()


@pytest.fixture
def config(cluster: None, in_store: str, phantoms: Path) -> CompareConfig:
    """A comparison of two runs."""
    options = {"strategies": "frozen,partial", "seeds": 1, "epochs": 2, "threads": 1, "register": "none"}
    return small(CompareConfig, phantoms, engine="ray", **options)


def newest() -> tuple[LoggedRun, dict[str, LoggedRun]]:
    """The newest comparison, and its runs by name."""
    parent = newest_parent()
    return parent, {run.name: run for run in children(parent.run_id)}


@pytest.mark.slow
def test_a_lost_process_changes_nothing_in_the_end(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv(DEATH, str(tmp_path / "died"))
    compare_tracked(config, said.append)
    parent, runs = newest()
    assert any("lost (WorkerCrashedError)" in line and "is tried again" in line for line in said)
    assert [run.status for run in runs.values()] == ["FINISHED", "FINISHED"]
    assert len(children(parent.run_id)) == 2
    compare_tracked(config.replace(engine="local", jobs="1", cache_dir=str(tmp_path / "other")), quiet)
    _, expected = newest()
    assert runs.keys() == expected.keys()
    for name, run in runs.items():
        assert run.history("val_loss") == expected[name].history("val_loss")
        pd.testing.assert_frame_equal(run.predictions("test"), expected[name].predictions("test"), check_exact=True)


@pytest.mark.slow
def test_an_error_of_the_user_is_raised_once(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR, "the disk of the node is full")
    with pytest.raises(UserError, match=r"^the disk of the node is full$"):
        compare_tracked(config.replace(seed=50), quiet)
    parent, _ = newest()
    assert parent.status == "FAILED"


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--engine ray: Ray is not installed; install the extra `ray`"):
        _connected()


def fake(address: str, names: list[str]) -> Any:
    """A cluster of such nodes; this machine is `here`."""
    nodes = [
        {"NodeManagerHostname": name, "NodeManagerAddress": f"{name}-ip", "Alive": True, "Resources": {"CPU": 4.0}}
        for name in names
    ]
    return SimpleNamespace(nodes=lambda: nodes, util=SimpleNamespace(get_node_ip_address=lambda: address))


def test_a_store_on_this_machine_is_refused_where_others_take_part() -> None:
    sqlite, server = ("sqlite:///mlflow.db",) * 2, ("http://server:5000",) * 2
    _require_reachable(fake("here-ip", ["here"]), sqlite)
    _require_reachable(fake("here-ip", ["here", "there"]), server)
    with pytest.raises(UserError, match=r"there cannot log to sqlite:///mlflow.db; start an MLflow server"):
        _require_reachable(fake("here-ip", ["here", "there"]), sqlite)


@pytest.fixture
def lost(in_store: str, monkeypatch: pytest.MonkeyPatch) -> Child:
    """A child whose run is RUNNING, as its process left it."""
    monkeypatch.setattr(on_ray, "IN_USE", 0.0)
    mlflow.set_experiment("cxr")
    run_id = MlflowClient().create_run("0").info.run_id
    return Child("frozen-s0", TrainConfig(threads=2), run_id, "parent")


def test_a_run_is_not_tried_for_ever(lost: Child) -> None:
    tries, said = Counter[str](), list[str]()
    assert _again(lost, InUseError("not let go of yet"), tries, said.append) == [lost]
    for _ in range(RETRIES - 1):
        assert _again(lost, "NodeDiedError", tries, said.append) == [lost]
    assert said == [f"frozen-s0: lost (NodeDiedError); run {lost.run_id} is tried again"] * (RETRIES - 1)
    assert LoggedRun.open(lost.run_id).status == "KILLED"
    MlflowClient().update_run(lost.run_id, status="RUNNING")
    with pytest.raises(MachineError, match=r"frozen-s0: run \w+ was lost 4 times \(stopped\)"):
        _again(lost, "", tries, quiet)
    assert LoggedRun.open(lost.run_id).status == "KILLED"


def test_a_run_that_had_finished_when_its_node_was_lost_is_not_trained_again(lost: Child) -> None:
    MlflowClient().set_tag(lost.run_id, Tag.OUTCOME, "finished")
    MlflowClient().set_terminated(lost.run_id, "FINISHED")
    said: list[str] = []
    assert _again(lost, "NodeDiedError", Counter(), said.append) == []
    assert said == [f"frozen-s0: finished, run {lost.run_id}"]
    assert LoggedRun.open(lost.run_id).status == "FINISHED"


def test_all_that_have_ended_are_dealt_with_before_an_error_is_raised(lost: Child) -> None:
    failed = ("failed", UserError("the disk is full"))
    with pytest.raises(UserError, match="the disk is full"):
        _settled([(lost, failed), (lost, ("lost", "NodeDiedError"))], Counter(), quiet, lambda child: child)
    assert LoggedRun.open(lost.run_id).status == "KILLED"
    with pytest.raises(ChildError, match="frozen-s0:\nTraceback"):
        _settled([(lost, ("failed", "Traceback"))], Counter(), quiet, lambda child: child)
    assert _settled([(lost, ("begin again", ""))], Counter(), quiet, lambda child: child) == [lost]


def test_a_task_that_no_node_can_take_is_refused(lost: Child) -> None:
    cluster = fake("here-ip", ["here", "there"])
    _require_room(cluster, [lost])
    with pytest.raises(UserError, match=r"a run takes 5 threads, and no node has more than 4; use --threads"):
        _require_room(cluster, [replace(lost, config=TrainConfig(threads=5))])
