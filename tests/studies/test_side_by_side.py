"""Runs of a comparison at work side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from newest import newest_parent
from small import quiet, small
from workers import fork_workers

from cxr.config import CompareConfig, TrainConfig, configure
from cxr.errors import ChildError, MachineError, UserError
from cxr.machine import Machine, ready_machine
from cxr.studies import family, side_by_side
from cxr.studies.child import Child
from cxr.studies.compare import compare_tracked
from cxr.studies.side_by_side import _one_gpu, _Worker, at_once
from cxr.tracking.nested import children
from cxr.tracking.reading import LoggedRun

CPU, CUDA = Machine(torch.device("cpu"), "fp32"), Machine(torch.device("cuda"), "bf16")


@pytest.fixture
def config(in_store: str, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> CompareConfig:
    """A comparison of four runs, two at once."""
    fork_workers(monkeypatch)
    return small(CompareConfig, phantoms, register="none", strategies="frozen,partial", seeds=2, jobs="2")


def results(parent: LoggedRun) -> dict[str, tuple[dict[int, float], pd.DataFrame]]:
    """Name of each run -> its losses by epoch, and its predictions on test."""
    return {run.name: (run.history("val_loss"), run.predictions("test")) for run in children(parent.run_id)}


def require_equal(one: LoggedRun, other: LoggedRun) -> None:
    """Both have the same four finished runs with the same numbers."""
    first, second = results(one), results(other)
    assert set(first) == set(second) == {"frozen-s0", "partial-s0", "frozen-s1", "partial-s1"}
    assert len(children(one.run_id)) == len(children(other.run_id)) == 4
    for name, (losses, predictions) in first.items():
        assert losses == second[name][0]
        pd.testing.assert_frame_equal(predictions, second[name][1], check_exact=True)


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_how_many_are_at_work(config: CompareConfig, tmp_path: Path) -> None:
    said: list[str] = []
    compare_tracked(config, said.append)
    side_by_side_parent = newest_parent()
    assert "2 at once (--jobs 2)" in said
    assert any(line.startswith("partial-s1: epoch  0") for line in said)
    assert {run.status for run in children(side_by_side_parent.run_id)} == {"FINISHED"}
    compare_tracked(config.replace(jobs="1", cache_dir=str(tmp_path / "other")), quiet)
    assert newest_parent().run_id != side_by_side_parent.run_id
    require_equal(side_by_side_parent, newest_parent())


@pytest.mark.slow
def test_a_killed_process_leaves_a_comparison_that_goes_on(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, pids = _Worker.take, []

    def noted(worker: _Worker, waiting: deque[Child]) -> None:
        pids.append(worker.process.pid)
        take(worker, waiting)

    def kill_one(line: str) -> None:
        if ": epoch  0" in line and pids:
            os.kill(pids[0], signal.SIGKILL)
            pids.clear()

    with monkeypatch.context() as patched:
        patched.setattr(_Worker, "take", noted)
        with pytest.raises(MachineError, match=r"was killed \(exit code -9\).*repeat the command"):
            compare_tracked(config, kill_one)
    assert newest_parent().status == "FAILED"
    assert "RUNNING" not in {run.status for run in children(newest_parent().run_id)}
    compare_tracked(config, quiet)
    broken = newest_parent()
    compare_tracked(config.replace(jobs="1", cache_dir=str(tmp_path / "other")), quiet)
    require_equal(broken, newest_parent())


@pytest.mark.parametrize(
    ("error", "kind"), [(UserError("the disk is full"), UserError), (ValueError("a bug"), ChildError)]
)
def test_the_first_failure_stops_the_others_and_is_raised_once(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    fork_workers(monkeypatch, {"partial": error})
    with pytest.raises(kind, match=str(error)):
        compare_tracked(config.replace(seed=30 if kind is UserError else 40, epochs=500), quiet)
    parent = newest_parent()
    assert parent.status == "FAILED"
    assert str(error) in parent.tags["cxr.error"]
    assert "RUNNING" not in {run.status for run in children(parent.run_id)}


def test_the_audit_is_made_while_the_processes_start_and_its_failure_ends_them(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        assert len(multiprocessing.active_children()) == 2
        raise UserError("leaks across splits")

    monkeypatch.setattr(family, "_audit", fail)
    with pytest.raises(UserError, match="leaks across splits"):
        compare_tracked(config.replace(seed=50), quiet)
    assert not multiprocessing.active_children()
    parent = newest_parent()
    assert parent.status == "FAILED"
    assert {run.status for run in children(parent.run_id)} == {"SCHEDULED"}


@pytest.mark.parametrize(
    ("jobs", "machine", "threads", "expected"),
    [("3", CPU, 1, 3), ("9", CUDA, 0, 4), ("auto", CPU, 1, 4), ("auto", CPU, 4, 2), ("auto", CUDA, 0, 2)],
)
def test_as_many_as_cores_memory_or_gpus_allow(
    monkeypatch: pytest.MonkeyPatch, jobs: str, machine: Machine, threads: int, expected: int
) -> None:
    monkeypatch.setattr(side_by_side, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert at_once(jobs, 4, machine, threads)[0] == expected


def test_little_memory_means_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "cores", lambda: 8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 7e9}))
    assert at_once("auto", 8, CPU, 1) == (2, "8 core(s) of 1 thread(s) a run, memory for 2")


def test_processes_take_turns_on_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [_one_gpu(number, 2)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [_one_gpu(number, 2)["CUDA_VISIBLE_DEVICES"] for number in range(2)] == ["5", "7"]
    assert _one_gpu(3, 1) == {}


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5", ""])
def test_jobs_is_a_number_or_auto(jobs: str) -> None:
    with pytest.raises(UserError, match=r"--jobs .*: use a number from 1, or auto"):
        configure(CompareConfig, {"jobs": jobs})


def test_threads_are_those_of_the_configuration() -> None:
    before = torch.get_num_threads()
    ready_machine(TrainConfig(device="cpu", threads=2))
    assert torch.get_num_threads() == 2
    ready_machine(TrainConfig(device="cpu"))
    assert torch.get_num_threads() == before
