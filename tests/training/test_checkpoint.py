from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cxr.errors import UserError
from cxr.storage import write_atomically
from cxr.training.checkpoint import LAST, Checkpoints, _parts, in_one_transfer


class Slow:
    """A disk that writes nothing until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go, self._whole = threading.Event(), Checkpoints._write
        monkeypatch.setattr(Checkpoints, "_write", lambda one, write: self._held(one, write))

    def _held(self, one: Checkpoints, write: Callable[[], object]) -> None:
        assert self.go.wait(20)
        self._whole(one, write)


@contextmanager
def full_disk(limit: int = 2000) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: the system refuses the write as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """One whole checkpoint."""
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save_tensors("base-0", {"a": torch.ones(3)})
    checkpoints.save({"epoch": 4, "tensors": {"a": torch.arange(3)}}, keep={"base-0.safetensors"})
    checkpoints.flush()
    return checkpoints


def test_a_new_folder_has_no_state(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").load() is None


def test_what_is_saved_is_loaded(saved: Checkpoints) -> None:
    state = saved.load()
    assert state is not None
    assert state["epoch"] == 4
    assert torch.equal(state["tensors"]["a"], torch.arange(3))
    assert torch.equal(saved.load_tensors(["base-0.safetensors"])["a"], torch.ones(3))


def test_training_goes_on_while_the_disk_is_slow_and_changes_nothing_that_is_saved(
    saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, weight = Slow(monkeypatch), torch.ones(3)
    best = saved.save_tensors("best-5", {"a": weight})
    saved.save({"epoch": 5, "optimizer": {0: [(weight,)]}}, keep={best})  # returns at once
    weight.zero_()
    disk.go.set()
    state = saved.load()  # waits
    assert state is not None
    assert torch.equal(state["optimizer"][0][0][0], torch.ones(3))
    assert torch.equal(saved.load_tensors([best])["a"], torch.ones(3))


def test_the_block_ends_when_all_is_written_even_if_the_wait_for_it_was_interrupted(
    saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    disk = Slow(monkeypatch)
    with pytest.raises(KeyboardInterrupt), saved:
        saved.save_tensors("best-5", {"a": torch.ones(3)})
        monkeypatch.setattr(saved._waiting[0], "result", interrupted)
        threading.Timer(0.2, disk.go.set).start()
        saved.flush()
    assert (saved.folder / "best-5.safetensors").exists()
    assert not any(thread.name.startswith("checkpoints") for thread in saved._writer._threads if thread.is_alive())


def test_a_state_never_names_tensors_that_could_not_be_written(saved: Checkpoints) -> None:
    with full_disk(), pytest.raises(UserError, match=r"best-5"), saved:
        best = saved.save_tensors("best-5", {"a": torch.ones(2000)})
        saved.save({"epoch": 5}, keep={best})
    state = saved.load()
    assert state is not None
    assert state["epoch"] == 4


def test_a_failed_write_does_not_hide_what_ended_the_run(saved: Checkpoints) -> None:
    with full_disk(), pytest.raises(KeyboardInterrupt), saved:
        saved.save_tensors("best-5", {"a": torch.ones(2000)})
        raise KeyboardInterrupt


def test_a_first_state_is_there_when_save_returns(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save({"epoch": 0}, keep=set())
    assert (tmp_path / LAST).exists()


def test_the_state_holds_no_code(saved: Checkpoints) -> None:
    assert torch.load(saved.folder / LAST, weights_only=True)["epoch"] == 4


def test_a_later_file_wins(saved: Checkpoints) -> None:
    better = saved.save_tensors("best-1", {"a": torch.zeros(3), "b": torch.ones(1)})
    merged = saved.load_tensors(["base-0.safetensors", better])
    assert torch.equal(merged["a"], torch.zeros(3))
    assert merged.keys() == {"a", "b"}


def test_tensors_of_any_layout_come_back_equal(saved: Checkpoints) -> None:
    tensor = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    state = {"a": tensor, "transposed": tensor[0, 0].T, "number": torch.tensor(3)}
    loaded = saved.load_tensors([saved.save_tensors("best-2", state)])
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_saving_removes_what_the_state_no_longer_names(saved: Checkpoints) -> None:
    saved.save_tensors("best-1", {"a": torch.zeros(3)})
    (saved.folder / ".best-2.safetensors.tmp").write_bytes(b"half-writ")
    saved.save({"epoch": 5}, keep={"best-1.safetensors"})
    saved.flush()
    assert files(saved.folder) == {LAST, "best-1.safetensors"}


@pytest.mark.parametrize("size", [600, 100_000])
def test_a_full_disk_is_told_and_the_old_checkpoint_still_loads(saved: Checkpoints, size: int) -> None:
    before, big = files(saved.folder), {"a": torch.zeros(size)}
    with full_disk(), pytest.raises(UserError, match=r"best-9.*: cannot be written \(File too large\).*--cache-dir"):
        saved.save_tensors("best-9", big)
        saved.flush()
    with full_disk(), pytest.raises(UserError, match=r"last\.pt: cannot be written \(File too large\).*--cache-dir"):
        saved.save({"epoch": 5, "tensors": big}, keep=set())
        saved.flush()
    assert files(saved.folder) == before
    state = saved.load()
    assert state is not None
    assert state["epoch"] == 4


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "run")
    checkpoints.save_tensors("base-0", {"a": torch.ones(1)})
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        checkpoints.flush()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    def interrupted(stream: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_atomically(path, lambda stream: stream.write(b"old"))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_bytes() == b"old"


def test_a_state_of_another_version_is_refused(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr.training.checkpoint.VERSION", 2)
    with pytest.raises(UserError, match="another version"):
        saved.load()


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_damaged_state_is_refused(saved: Checkpoints, keep: int) -> None:
    path = saved.folder / LAST
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"last\.pt: this checkpoint cannot be read .*start a new run"):
        saved.load()


def test_missing_or_damaged_tensors_are_named(saved: Checkpoints) -> None:
    path = saved.folder / "base-0.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="base-0"):
        saved.load_tensors([path.name])
    path.unlink()
    with pytest.raises(UserError, match="base-0"):
        saved.load_tensors([path.name])


def test_the_old_file_is_replaced_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda stream: stream.write(b"old"))
    with path.open("rb") as reader:
        write_atomically(path, lambda stream: stream.write(b"new"))
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert files(tmp_path) == {"file"}


def test_tensors_copied_in_one_transfer_keep_values_types_and_strides() -> None:
    images = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    whole = [images, torch.tensor(7), torch.empty(0), torch.tensor([True, False]), torch.randn(3, dtype=torch.float64)]
    copies = in_one_transfer(whole)
    assert [copy.stride() for copy in copies] == [tensor.stride() for tensor in whole]
    assert all(
        torch.equal(copy, tensor) and copy.dtype == tensor.dtype for copy, tensor in zip(copies, whole, strict=True)
    )
    images.zero_()
    assert copies[0].abs().sum() > 0
    assert in_one_transfer([]) == []
    assert [len(part) for part in _parts([torch.zeros(8_000_000)] * 5)] == [2, 2, 1]  # 32 MB each


@pytest.mark.parametrize("name", [LAST, "base-0.safetensors"])
def test_a_changed_byte_is_never_used(saved: Checkpoints, name: str) -> None:
    path = saved.folder / name
    whole, mark = path.read_bytes(), 16 if name == LAST else 0
    for place in range(0, len(whole) - mark, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        read = Checkpoints(saved.folder, writes=False)
        with pytest.raises(UserError, match=f"{path}: this checkpoint cannot be read"):
            read.load_tensors([*(read.load() or ()), "base-0.safetensors"][-1:])


def test_a_checkpoint_of_an_earlier_version_is_read(saved: Checkpoints) -> None:
    torch.save({"version": 1, "epoch": 3}, saved.folder / LAST)
    read = Checkpoints(saved.folder)
    assert read.load() == {"version": 1, "epoch": 3}
    assert torch.equal(read.load_tensors(["base-0.safetensors"])["a"], torch.ones(3))
