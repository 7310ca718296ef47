"""What is looked at before a run begins or goes on."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cxr.config import TrainConfig
from cxr.errors import MachineError, UserError
from cxr.runs.resume import checkpoints_of, remove_finished
from cxr.storage import remove_folder
from cxr.tracking.lifecycle import this_process
from cxr.tracking.reading import LoggedRun


@pytest.mark.parametrize(("cause", "asked"), [(None, 3), (ConnectionRefusedError(), 1)])
def test_a_store_that_does_not_answer_is_asked_once_about_checkpoints_left(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception | None, asked: int
) -> None:
    config, calls = TrainConfig(), list[str]()
    for name in ("a", "b", "c"):
        checkpoints_of(config, name).mkdir(parents=True)

    def unknown(run_id: str) -> LoggedRun:
        calls.append(run_id)
        raise (MachineError("away") if cause else UserError("no such run")) from cause

    monkeypatch.setattr(LoggedRun, "open", unknown)
    remove_finished(config)
    assert len(calls) == asked
    assert all(checkpoints_of(config, name).is_dir() for name in ("a", "b", "c"))


def test_a_run_may_end_and_remove_its_checkpoints_while_another_begins(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig()
    folder = checkpoints_of(config, "ending")
    folder.mkdir(parents=True)
    (folder / "last.pt").touch()

    def just_ended(run_id: str) -> SimpleNamespace:
        remove_folder(folder)  # as its own process does
        return SimpleNamespace(finished=True)

    monkeypatch.setattr(LoggedRun, "open", just_ended)
    remove_finished(config)
    remove_folder(folder)
    assert list(folder.parent.iterdir()) == []


GONE = {"cxr.host": "here", "cxr.process": this_process().replace(str(os.getpid()), "999999999", 1)}
AT_WORK = {"cxr.host": "here", "cxr.process": this_process()}


@pytest.mark.parametrize(
    ("status", "tags", "over"),
    [
        ("KILLED", {}, True),
        ("FAILED", {}, True),
        ("RUNNING", GONE, True),
        ("RUNNING", GONE | {"cxr.host": "elsewhere"}, False),
        ("RUNNING", AT_WORK, False),
    ],
)
@pytest.mark.parametrize("file", [None, ".lock", "last.pt"])
def test_only_an_empty_folder_of_a_run_that_is_over_is_removed(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, status: str, tags: dict[str, str], over: bool, file: str | None
) -> None:
    config = TrainConfig()
    folder = checkpoints_of(config, "killed")
    folder.mkdir(parents=True)
    if file:
        (folder / file).touch()
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    monkeypatch.setattr(LoggedRun, "open", lambda run_id: SimpleNamespace(finished=False, status=status, tags=tags))
    remove_finished(config)
    assert folder.exists() == (not over or file == "last.pt")


def test_what_a_process_left_that_was_killed_while_it_removed_a_folder_is_removed(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    runs = checkpoints_of(TrainConfig(), "any").parent
    (runs / ".building-here-999999999-ended" / "removed").mkdir(parents=True)
    remove_finished(TrainConfig())
    assert list(runs.iterdir()) == []
