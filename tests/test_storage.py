"""The cache folder: what it lists, how files and folders are written, and when something is in use."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cxr import storage
from cxr.errors import InUseError, MachineError, UserError, disk_full
from cxr.storage import Cache, exclusive, new_folder, own_temporary_files, remove_folder, write_atomically


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache-dir .*cannot be made"):
        Cache.open(str(tmp_path / "file/below"))


def test_the_layout_is_the_one_that_earlier_versions_wrote(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    paths = [
        cache.activations,
        cache.checkpoints("r"),
        cache.decoded(224, "squash"),
        cache.phantoms(4),
        cache.audit("k"),
    ]
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == ["activations", "runs/r", "store/224-squash", "synthetic-4", "audits/k.json"]


def test_contents_are_listed_least_recently_used_first_with_size_and_age(tmp_path: Path) -> None:
    for name, used in (("runs/new", 2e9), ("activations/old", 1e9)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(bytes(8192))
        for path in (tmp_path / name / "file", tmp_path / name):
            os.utime(path, (used, used))
    old, new = Cache(tmp_path).contents()
    assert (old.kind, new.kind) == ("activations", "checkpoints")
    assert old.size >= 8192
    assert old.days > 5000
    assert old.line().endswith(f"activations     {old.path}")


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_other(tmp_path: Path) -> None:
    def full(stream: object) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(stream: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_atomically(path, lambda stream: stream.write(b"old"))
    with pytest.raises(MachineError, match="No space left on device"):
        write_atomically(path, full)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


def test_what_a_killed_process_wrote_half_is_removed_when_the_file_is_written(tmp_path: Path) -> None:
    host, dead = socket.gethostname(), 2**22 + 1
    names = (f".a.json.{host}.{dead}.tmp", f".a.json.{host}.{os.getppid()}.tmp", f".a.json.elsewhere.{dead}.tmp")
    for name in (*names, f".b.json.{host}.{dead}.tmp"):
        (tmp_path / name).touch()
    write_atomically(tmp_path / "a.json", lambda file: file.write(b"{}"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.json", *names[1:], f".b.json.{host}.{dead}.tmp"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "wanted") as work:
            (work / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "wanted") as work:
        (work / "whole").write_text("")
        assert not (tmp_path / "wanted").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["wanted", "whole"]


def test_a_folder_that_another_process_made_first_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "wanted") as work:
        (work / "ours").write_text("")
        (tmp_path / "wanted").mkdir()
        (tmp_path / "wanted/theirs").write_text("")
    assert [path.name for path in (tmp_path / "wanted").iterdir()] == ["theirs"]


def test_half_made_folders_are_removed_once_their_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    for name in (".building-here-1-running", ".building-here-999999999-ended", ".building-here-2-999999999-other"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "wanted"):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"wanted", ".building-here-1-running", ".building-here-2-999999999-other"}


def test_removing_a_folder_that_is_gone_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    remove_folder(tmp_path / "folder")
    remove_folder(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    in_use = pytest.raises(InUseError, match="--resume run: another process")
    with exclusive(tmp_path / "run"), in_use, exclusive(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with exclusive(tmp_path / "run"):
        pass


def test_a_folder_that_another_process_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Path.mkdir

    def removed_at_once(self: Path, *options: Any, **more: Any) -> None:
        made(self, *options, **more)
        monkeypatch.undo()
        self.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_at_once)
    with exclusive(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be locked"), exclusive(tmp_path / "file/run"):
        pass


def test_a_folder_that_cannot_take_its_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError), new_folder(tmp_path / "wanted"):
        (tmp_path / "wanted").write_text("")


def test_the_key_of_patients_is_made_once_and_read_by_its_owner_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    key = cache.patient_key()
    assert key == Cache(tmp_path).patient_key()
    assert len(key) == 32
    assert os.stat(tmp_path / "patients.key").st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["patients.key"]
    cache.prune(0)
    assert cache.patient_key() == key
    (tmp_path / "patients.key").write_bytes(key[:5])
    with pytest.raises(MachineError, match=r"patients.key: is damaged"):
        cache.patient_key()
    with pytest.raises(MachineError, match=r"patients.key: cannot be used"):
        Cache(tmp_path / "missing").patient_key()


def test_a_key_that_another_process_made_meanwhile_stays(tmp_path: Path) -> None:
    key = Cache(tmp_path).patient_key()
    storage._make_key(tmp_path / "patients.key")
    assert Cache(tmp_path).patient_key() == key


def test_temporary_files_are_in_a_folder_that_goes_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    host, dead = socket.gethostname(), 2**22 + 1  # more than Linux counts to
    (tmp_path / f"cxr-{host}-{dead}-a").mkdir()
    for name in (f"cxr-{host}-{os.getppid()}-b", f"cxr-{host}-x-{dead}-c", f"cxr-{host}-other"):
        (tmp_path / name).mkdir()
    with own_temporary_files():
        (folder,) = tmp_path.glob(f"cxr-{host}-{os.getpid()}-*")
        assert Path(tempfile.mkdtemp()).parent == folder
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path
    kept = {f"cxr-{host}-{os.getppid()}-b", f"cxr-{host}-x-{dead}-c", f"cxr-{host}-other"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert tempfile.gettempdir() == str(tmp_path)


def test_a_full_disk_for_temporary_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(MachineError, match=r"No space left on device.*TMPDIR"), own_temporary_files():
        raise AssertionError("there is no folder")


def test_the_error_of_a_full_disk_is_known_by_number_and_in_a_copied_folder() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/a/file")
    assert disk_full(full) == "/a/file: No space left on device"
    assert disk_full(shutil.Error([("/a", "/b", str(full))])) == "No space left on device"
    assert disk_full(OSError(errno.EACCES, "Permission denied")) is None
    assert disk_full(ValueError("No space left on device")) is None
