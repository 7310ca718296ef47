"""A tracking store that does not answer for a while."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from sqlalchemy.exc import IntegrityError, OperationalError

from cxr.errors import MachineError
from cxr.tracking import outage, outbox, tracker
from cxr.tracking.delivery import Entry, deliver
from cxr.tracking.lifecycle import open_run
from cxr.tracking.outage import OUTAGE, Outage, is_outage, reason_of, waits
from cxr.tracking.outbox import Outbox
from cxr.tracking.store import store_errors

AWAY = MlflowException(
    "API request to http://server/api failed with exception HTTPConnectionPool(host='server'): Max retries exceeded "
    "(Caused by NewConnectionError('<HTTPConnection object>: Failed to establish: [Errno 111] Connection refused'))"
)
LOST = RuntimeError("the power went")


def response(status: int) -> requests.Response:
    """An answer with that status."""
    found = requests.Response()
    found.status_code = status
    return found


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AWAY, True),
        (ConnectionRefusedError(), True),
        (requests.ConnectionError(), True),
        (requests.HTTPError(response=response(503)), True),
        (requests.HTTPError(response=response(404)), False),
        (MlflowException("later", TEMPORARILY_UNAVAILABLE), True),
        (RestException({"error_code": "INTERNAL_ERROR", "message": "server closed the connection"}), True),
        (RestException({"error_code": "BAD_REQUEST", "message": "(psycopg.InterfaceError) closed"}), True),
        (RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}), False),
        (MlflowException("changed", INVALID_PARAMETER_VALUE), False),
        (MlflowException("a bug"), False),
        (OperationalError("select", {}, Exception("database is locked")), True),
        (OperationalError("select", {}, Exception("database or disk is full")), False),
        (IntegrityError("insert", {}, Exception("unique")), False),
        (ValueError(), False),
        (FileNotFoundError(), False),
    ],
)
def test_what_may_be_answered_later_is_an_outage(error: Exception, expected: bool) -> None:
    assert is_outage(error) is expected
    wrapped = MachineError("in one line")
    wrapped.__cause__ = error
    assert is_outage(wrapped) is expected


def test_the_reason_is_the_innermost_cause() -> None:
    assert reason_of(AWAY) == "[Errno 111] Connection refused"
    busy = "API request to http://s/a failed with exception HTTPConnectionPool(host='s'): Max retries with url: /a"
    assert reason_of(MlflowException(f"{busy} (Caused by ResponseError('too many 503 error responses'))")) == (
        "too many 503 error responses"
    )
    assert reason_of(ValueError("one\ntwo")) == "one"
    assert reason_of(ValueError()) == "ValueError"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow one another at once."""
    monkeypatch.setattr(outage, "RETRY", 0.0)
    monkeypatch.setattr(outbox, "RETRY", 0.01)


def failing(errors: list[Exception]) -> Callable[[], str]:
    """A call that raises these errors, one at a time, and is then answered."""

    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "answer"

    return call


def test_a_call_waits_and_one_line_says_so_at_each_end(no_pauses: None) -> None:
    said: list[str] = []
    state = Outage(lambda: "MLflow at URI")
    state.allow(30, said.append)
    assert state.ride_out(failing([AWAY, AWAY, AWAY])) == "answer"
    assert state.ride_out(failing([])) == "answer"
    assert len(said) == 2
    assert "does not answer ([Errno 111] Connection refused)" in said[0]
    assert "up to 30 minutes" in said[0]
    assert said[1].startswith("MLflow at URI answers again, after 0 s")


def test_without_patience_or_hope_a_call_fails_at_once() -> None:
    state = Outage(lambda: "MLflow at URI")
    with pytest.raises(MlflowException, match="refused"):
        state.ride_out(failing([AWAY]))
    state.allow(30, print)
    with pytest.raises(ValueError, match="no number"):
        state.ride_out(failing([ValueError("no number")]))


def test_the_patience_ends_with_the_block(no_pauses: None) -> None:
    with OUTAGE.restored():
        OUTAGE.allow(30, lambda line: None)

        @waits
        def ask(call: Callable[[], str]) -> str:
            with store_errors():
                return call()

        assert ask(failing([AWAY])) == "answer"
    with pytest.raises(MachineError, match="refused"):
        ask(failing([AWAY]))


class Store:
    """In place of MLflow: it notes what is delivered, or raises."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.errors: list[BaseException] = []
        self.away = False

    def deliver(self, run_id: str, entry: Entry, folder: Path) -> None:
        """Note the entry."""
        if self.away:
            raise AWAY
        if self.errors:
            raise self.errors.pop(0)
        self.entries.append(entry)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> Iterator[Store]:
    """A store that answers."""
    found = Store()
    monkeypatch.setattr(outbox, "deliver", found.deliver)
    with OUTAGE.restored():
        OUTAGE.allow(30, lambda line: None)
        yield found
    OUTAGE.ended()


def numbered(count: int) -> list[Entry]:
    """Entries that can be told apart."""
    return [{"kind": "tags", "values": {"number": str(number)}} for number in range(count)]


def test_entries_arrive_in_order_and_once_whatever_fails_meanwhile(there: Store, tmp_path: Path) -> None:
    box, entries = Outbox("run", tmp_path / "box"), numbered(20)
    there.errors = [AWAY, ConnectionResetError(), AWAY]
    box.start()
    for entry in entries:
        box.put(entry)
    box.drain(print)
    box.close()
    assert there.entries == entries
    assert not (tmp_path / "box").exists()


def test_what_a_killed_process_left_is_delivered_by_the_next(there: Store, tmp_path: Path) -> None:
    there.away = True
    box, entries = Outbox("run", tmp_path / "box"), numbered(3)
    box.start()
    for entry in entries:
        box.put(entry)
    box.close()  # a store that is away keeps no run from ending
    with box.artifact("orphan.txt") as file:  # of a process that was killed before its entry was written
        file.write_text("half")
    left = Outbox("run", tmp_path / "box")
    with pytest.raises(MlflowException, match="refused"):
        left.deliver_left()
    there.away = False
    assert left.deliver_left() == 3
    assert there.entries == entries
    assert left.deliver_left() == 0
    assert not (tmp_path / "box").exists()


def test_an_error_that_waiting_cannot_mend_reaches_the_run(there: Store, tmp_path: Path) -> None:
    box = Outbox("run", tmp_path / "box")
    there.errors = [LOST]
    box.start()
    box.put(numbered(1)[0])
    with pytest.raises(RuntimeError, match="the power went"):
        box.drain(print)
    with pytest.raises(RuntimeError, match="the power went"):
        box.put(numbered(1)[0])
    box.close()
    assert len(list((tmp_path / "box").glob("*.json"))) == 1


def test_a_spent_patience_says_where_the_entries_are_and_how_to_go_on(there: Store, tmp_path: Path) -> None:
    said: list[str] = []
    there.away = True
    box = Outbox("abc", tmp_path / "box")
    box.start()
    box.put(numbered(1)[0])
    OUTAGE.allow(0.001, said.append)
    with pytest.raises(MachineError, match=rf"1 entries of run abc are kept in {tmp_path}.*cxr train --resume abc"):
        box.drain(said.append)
    box.close()


def everything(run_id: str) -> tuple[object, ...]:
    """What the store knows of a run but the times."""
    run = mlflow.get_run(run_id)
    client = mlflow.MlflowClient()
    histories = {
        name: [(each.step, each.value) for each in client.get_metric_history(run_id, name)]
        for name in run.data.metrics
        if not name.startswith("system/")
    }
    files = {
        each.path: mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{each.path}")
        for each in client.list_artifacts(run_id)
    }
    inputs = [(each.dataset.name, each.tags[0].value) for each in run.inputs.dataset_inputs]
    tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
    return run.data.params, tags, histories, files, inputs, run.info.status


def log_all(run: tracker.MlflowTracker) -> None:
    """One of each kind."""
    run.params({"a": "1"})
    run.tags({"b": "2"})
    for epoch in range(3):
        run.metrics({"loss": 1 / (1 + epoch), "nothing": float("nan") if epoch < 0 else 0.0}, step=epoch)
    run.text("Grüße\n", "notes.txt")
    table = pd.DataFrame({"path": ["a"], "digest": ["00"], "split": ["train"], "label": [0]})
    run.table(table, "table.csv")
    run.dataset(table, Path("images"), "train", "training")


def test_a_run_through_the_outbox_leaves_what_a_direct_one_leaves(
    in_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    with open_run("direct") as direct:
        log_all(direct)
    failures = [AWAY, None, None, AWAY, None, requests.ConnectionError(), None, None]

    def sometimes(run_id: str, entry: Entry, folder: Path) -> None:
        failure = failures.pop(0) if failures else None
        if failure is not None:
            deliver(run_id, entry, folder)  # the answer is lost, not the request
            raise failure
        deliver(run_id, entry, folder)

    monkeypatch.setattr(outbox, "deliver", sometimes)
    with open_run("ahead", outbox=lambda run_id: tmp_path / run_id) as ahead:
        ahead.write_ahead(30, lambda line: None)
        log_all(ahead)
    assert not failures
    assert everything(ahead.run_id) == everything(direct.run_id)
    assert not (tmp_path / ahead.run_id).exists()


def test_what_was_left_is_in_the_store_before_a_run_goes_on(
    in_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run("direct") as direct:
        log_all(direct)

    def away(run_id: str, entry: Entry, folder: Path) -> None:
        raise AWAY

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(outbox, "deliver", away)
        with open_run("broken", outbox=lambda run_id: tmp_path / run_id) as broken:
            broken.write_ahead(30, lambda line: None)
            log_all(broken)
            raise KeyboardInterrupt
    assert mlflow.get_run(broken.run_id).info.status == "KILLED"
    assert mlflow.get_run(broken.run_id).data.metrics == {}
    first = json.loads((tmp_path / broken.run_id / "000001.json").read_text())
    assert first == {"kind": "params", "values": {"a": "1"}}
    with open_run("broken", run_id=broken.run_id, outbox=lambda run_id: tmp_path / run_id) as again:
        assert dict(again.logged("loss")) == {0: 1.0, 1: 1 / 2, 2: 1 / 3}
    assert everything(broken.run_id) == everything(direct.run_id)


def test_system_metrics_go_through_the_tracker_and_end_with_a_run_that_is_gone(
    in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    said = threading.Event()
    logged: list[str] = []

    def metrics(own: tracker.MlflowTracker, values: dict[str, float], step: int | None = None) -> None:
        logged.extend(values)
        if step == 2:
            raise MlflowException("Run not found")

    monkeypatch.setattr(tracker.MlflowTracker, "metrics", metrics)
    with OUTAGE.restored(), open_run("measured"):
        OUTAGE.allow(30, lambda line: said.set() if "no more system metrics" in line else None)
        assert said.wait(20)
    assert "system/cpu_utilization_percentage" in logged
