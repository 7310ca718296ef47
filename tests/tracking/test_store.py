"""A SQLite store that is not there yet."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow.store.db import utils
from started import CONTEXT

from cxr.errors import UserError
from cxr.tracking import store as stores
from cxr.tracking.store import prepare


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the store in use will be."""
    before, file = mlflow.get_tracking_uri(), tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    mlflow.set_tracking_uri(f"sqlite:///{file}")
    yield file
    mlflow.set_tracking_uri(before)


def _die_in_the_middle(uri: str) -> None:
    mlflow.set_tracking_uri(uri)
    utils._upgrade_db = lambda engine: os.kill(os.getpid(), signal.SIGKILL)  # the first tables are made
    prepare()


@pytest.mark.slow
def test_a_store_whose_making_was_killed_is_made_again(database: Path) -> None:
    process = CONTEXT.Process(target=_die_in_the_middle, args=(f"sqlite:///{database}",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not database.exists()
    assert (database.parent / ".mlflow.db.making").stat().st_size > 0
    prepare()
    assert not list(database.parent.glob(".*making*"))
    assert [each.name for each in mlflow.search_experiments()] == ["Default"]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_store_that_cannot_be_made_leaves_nothing(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(engine: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "_initialize_tables", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare()
    assert [path.name for path in database.parent.iterdir()] == [".mlflow.db.lock"]


def test_stores_on_network_file_systems_are_not_in_write_ahead_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mount:
        def __init__(self, mountpoint: Path, fstype: str):
            self.mountpoint, self.fstype = str(mountpoint), fstype

    mounts = [Mount(Path("/"), "ext4"), Mount(tmp_path / "shared", "nfs4"), Mount(tmp_path / "shared/own", "xfs")]
    monkeypatch.setattr(stores.psutil, "disk_partitions", lambda all: mounts)
    folders = {name: stores._on_network(tmp_path / name) for name in ("here", "shared", "shared/deep/er", "shared/own")}
    assert folders == {"here": False, "shared": True, "shared/deep/er": True, "shared/own": False}
