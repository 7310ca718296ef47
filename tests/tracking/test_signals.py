"""Signals that arrive in the middle of a database transaction."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from mlflow.entities import Run
from sqlalchemy.engine.default import DefaultDialect

from cxr.errors import Stopped
from cxr.tracking.lifecycle import open_run
from cxr.tracking.nested import ending, join_parent, open_parent
from cxr.tracking.signals import in_transaction


@pytest.mark.parametrize("moment", ["do_commit", "do_execute", "do_close", "do_rollback"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_a_transaction(
    in_store: str, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    original = getattr(DefaultDialect, moment)
    sent: list[int] = []

    def interrupted(*arguments: object) -> object:
        if not sent and ("metrics" in str(arguments[2:]) or moment != "do_execute"):
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(*arguments)

    with pytest.raises((KeyboardInterrupt, Stopped)), open_run("stopped") as tracker:
        if moment == "do_close":
            mlflow.tracking._tracking_service.utils._get_store().engine.dispose()  # connections are closed with it
        monkeypatch.setattr(DefaultDialect, moment, interrupted)
        tracker.metrics({"val_loss": 0.5}, step=0)
        mlflow.tracking._tracking_service.utils._get_store().engine.dispose()
        time.sleep(5)  # the signal comes before
    assert sent
    run = mlflow.get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics["val_loss"]) == ("KILLED", 0.5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_is_opened_ends_it(in_store: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    create, made = mlflow.MlflowClient.create_run, list[str]()

    def interrupted(self: mlflow.MlflowClient, *arguments: object, **options: object) -> Run:
        run = create(self, *arguments, **options)
        made.append(run.info.run_id)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        return run

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", interrupted)
    with pytest.raises((KeyboardInterrupt, Stopped)), open_run("stopped"):
        time.sleep(5)  # the signal comes before
    assert mlflow.get_run(made[0]).info.status == "KILLED"


def test_sigterm_while_a_parent_ends_does_not_leave_it_running(in_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_terminated, sent = mlflow.MlflowClient.set_terminated, list[int]()

    def interrupted(self: mlflow.MlflowClient, *arguments: object) -> None:
        if not sent:
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        set_terminated(self, *arguments)

    parent = open_parent("search", {}, {"a": "b"})
    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", interrupted)
    with pytest.raises(Stopped), ending(parent):
        join_parent(parent)
    assert mlflow.get_run(parent).info.status == "KILLED"


def test_a_stop_that_compiled_code_hides_behind_an_error_is_a_stop(in_store: str) -> None:
    with pytest.raises(KeyboardInterrupt), open_run("stopped") as tracker:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # the signal comes before
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    run = mlflow.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["cxr.error"]) == ("KILLED", "stopped by the user")


def test_a_pool_that_starts_a_thread_is_not_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    start, seen = threading.Thread.start, list[bool]()

    def noted(thread: threading.Thread) -> None:
        seen.append(in_transaction(sys._getframe()))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(int, "1").result() == 1
    threading.Thread(target=int).start()
    assert seen == [True, False]
