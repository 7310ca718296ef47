"""What is looked at before a run begins or goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cxr.config import TrainConfig
from cxr.errors import MachineError, UserError
from cxr.runs.resume import checkpoints_of, remove_finished
from cxr.storage import remove_folder
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
