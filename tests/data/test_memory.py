from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr.data import memory as module
from cxr.data.memory import Facts, Memory, state_of


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three files that are old enough to be remembered."""
    monkeypatch.setattr(module, "FRESH", 0)
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(path.name.encode() * 200)
    return paths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    of = Facts.of
    monkeypatch.setattr(Facts, "of", lambda file: (names.append(file.name), of(file))[1])
    return names


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_new_and_changed_files_are_read_again(files: list[Path], tmp_path: Path, reads: list[str]) -> None:
    kept = tmp_path / "files.sqlite"
    first = Memory(kept).facts(files)
    assert [each.digest for each in first] == [digest(path) for path in files]
    assert sorted(reads) == ["a", "b", "c"]
    reads.clear()
    assert Memory(kept).facts(files) == first
    assert reads == []
    files[1].write_bytes(b"x" * 200)  # as long as before
    again = Memory(kept).facts([*files, tmp_path / "gone"])
    assert sorted(reads) == ["b", "gone"]
    assert [each.digest for each in again] == [*map(digest, files), f"unreadable:{tmp_path}/gone"]


def test_a_change_that_keeps_size_and_time_is_seen(files: list[Path], tmp_path: Path) -> None:
    kept, before = tmp_path / "files.sqlite", files[0].stat()
    Memory(kept).facts(files)
    time.sleep(0.02)  # for the clock of the file system
    files[0].write_bytes(b"z" * before.st_size)
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Memory(kept).facts(files)[0].digest == digest(files[0])


def test_what_was_changed_just_now_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    fresh, kept = tmp_path / "fresh", tmp_path / "files.sqlite"
    fresh.write_bytes(b"1")
    Memory(kept).facts([fresh])
    Memory(kept).facts([fresh])
    assert reads == ["fresh", "fresh"]


def test_the_kind_of_a_file_is_remembered(files: list[Path], tmp_path: Path) -> None:
    files[0].write_bytes(bytes(128) + b"DICM" + bytes(20))
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(files[1], "PNG")
    expected = [(True, False), (False, True), (False, False)]
    for _ in range(2):
        facts = Memory(tmp_path / "files.sqlite").facts(files)
        assert [(each.dicom, each.deep) for each in facts] == expected


def test_no_path_is_kept(files: list[Path], tmp_path: Path) -> None:
    kept, private = tmp_path / "files.sqlite", tmp_path / "DOE-JANE.png"
    private.write_bytes(b"x")
    private.chmod(0)
    Memory(kept).facts([*files, private])
    assert b"DOE" not in kept.read_bytes()


def damage_row(kept: Path) -> None:
    with sqlite3.connect(kept) as base:
        base.execute("UPDATE files SET found = replace(found, '0 0', '1 0')")


@pytest.mark.parametrize(
    ("damage", "warned"),
    [
        (damage_row, False),
        (lambda kept: kept.write_bytes(b"no database at all" * 100), True),
        (lambda kept: kept.write_bytes(kept.read_bytes()[:5000]), True),
    ],
    ids=["a row", "the file", "cut off"],
)
def test_what_was_damaged_is_not_believed(
    files: list[Path], tmp_path: Path, damage: Callable[[Path], object], warned: bool
) -> None:
    kept = tmp_path / "files.sqlite"
    first = Memory(kept).facts(files)
    damage(kept)
    if warned:
        with pytest.warns(UserWarning, match="files.sqlite: (damaged|cannot be used)"):
            assert Memory(kept).facts(files) == first
    else:
        assert Memory(kept).facts(files) == first
    assert Memory(kept).facts(files) == first


def test_a_token_holds_until_the_file_changes(files: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "files.sqlite"
    Memory(kept).note(files[0], "checked", state_of(files[0]))
    Memory(kept).note(files[1], "checked", "another state")
    assert Memory(kept).confirms(files[0], "checked")
    assert not Memory(kept).confirms(files[0], "other")
    assert not Memory(kept).confirms(files[1], "checked")
    files[0].write_bytes(b"new")
    assert not Memory(kept).confirms(files[0], "checked")
    assert not Memory().confirms(files[0], "checked")
