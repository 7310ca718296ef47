from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run_main
from torch import Tensor
from torchvision.models import ResNet

from cxr.data.batches import Split
from cxr.errors import UserError
from cxr.network.freezing import apply_phase
from cxr.storage import Cache, exclusive
from cxr.strategies import HEAD, TOP, Phase
from cxr.training import reuse
from cxr.training.batch_source import BatchSource, SourceSettings
from cxr.training.row_file import RowFile, row_file_name

Splits = tuple[Split, Split]
SHAPE = (3, 2, 2)


def values(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit_in_another_process(tmp_path: Path, dtype: torch.dtype) -> None:
    rows, kept = np.array([4, 1]), values(2, dtype)
    first = RowFile(tmp_path / "x", 6, SHAPE, dtype)
    first.write(rows, kept)
    again = RowFile(tmp_path / "x", 6, SHAPE, dtype)
    assert list(again.missing(np.arange(6))) == [0, 2, 3, 5]
    assert torch.equal(again.values[[4, 1]], kept)
    assert torch.equal(first.values[[4, 1]], kept)


def test_a_damaged_row_is_missing(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "x", 3, SHAPE, torch.float32)
    file.write(np.arange(3), values(3))
    path = tmp_path / "x" / "rows.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert list(RowFile(tmp_path / "x", 3, SHAPE, torch.float32).missing(np.arange(3))) == [1]


def test_a_file_cut_short_gives_its_whole_rows_only(tmp_path: Path) -> None:
    RowFile(tmp_path / "x", 3, SHAPE, torch.float32).write(np.arange(3), values(3))
    with (tmp_path / "x" / "rows.bin").open("r+b") as file:
        file.truncate(60)
    assert list(RowFile(tmp_path / "x", 3, SHAPE, torch.float32).missing(np.arange(3))) == [1, 2]


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RowFile(tmp_path / "x", 3, SHAPE, torch.float32)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"No space left.*--reuse-gb 0"):
        file.write(np.arange(3), values(3))


def test_the_key_tells_its_parts_apart() -> None:
    assert len({row_file_name("a", 1), row_file_name("a", 2), row_file_name("a1"), row_file_name("a", "1")}) == 4


def test_the_least_recently_used_go_first_and_what_is_wanted_stays(tmp_path: Path) -> None:
    folder = tmp_path / "activations"
    for age, name in enumerate(["new", "old", "wanted"]):
        RowFile(folder / name, 100, (64, 4, 4), torch.float32).write(np.arange(100), torch.zeros(100, 64, 4, 4))
        for path in [*(folder / name).iterdir(), folder / name]:
            os.utime(path, (1e9 - age, 1e9 - age))
    assert [kept.path.name for kept in Cache(tmp_path).contents()] == ["wanted", "old", "new"]
    Cache(tmp_path).make_room(200_000, 700_000, {folder / "wanted"})
    assert {path.name for path in folder.iterdir()} == {"new", "wanted"}


def epochs(model: ResNet, splits: Splits, phase: Phase, root: Path | None, seed: int = 5) -> list[Tensor]:
    data = source(model, splits, phase, root, seed=seed)
    return [x for epoch in range(3) for x, _ in [*data.train(phase, epoch), *data.val(phase)]]


def source(
    model: ResNet, splits: Splits, phase: Phase, root: Path | None, budget: float = 1e9, **options: int
) -> BatchSource:
    """A source of two views whose phase has begun; `root` is the cache folder, None keeps in memory."""
    cache, seed = Cache(root) if root else None, options.pop("seed", 5)
    data = BatchSource(model, *splits, SourceSettings(8, seed, 2, "fp32", budget, (phase,), cache, **options))
    apply_phase(model, phase)
    data.enter(phase)
    return data


@pytest.mark.parametrize("phase", [HEAD, TOP])
def test_shared_files_change_no_number_and_a_second_run_computes_nothing(
    tiny: ResNet, splits: Splits, phase: Phase, tmp_path: Path, seen: list[int]
) -> None:
    expected = epochs(tiny, splits, phase, None)
    for computed in (2 * len(splits[0]) + len(splits[1]) + 2, 2):  # a pass of two for the size of an output
        seen.clear()
        got = epochs(tiny, splits, phase, tmp_path)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        assert sum(seen) == computed


@pytest.mark.parametrize(
    ("epochs", "runs", "disk", "kept"), [(1, 1, 1.0, False), (1, 50, 1e9, True), (9, 1, 1e9, True)]
)
def test_activations_are_kept_where_that_pays(
    tiny: ResNet,
    splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epochs: int,
    runs: int,
    disk: float,
    kept: bool,
) -> None:
    monkeypatch.setattr(reuse, "DISK", disk)
    got = [x for x, _ in source(tiny, splits, TOP, tmp_path, epochs=epochs, runs=runs).train(TOP, 0)]
    assert (tmp_path / "activations").exists() is kept
    afresh = source(tiny, splits, TOP, None, budget=0).train(TOP, 0)
    assert all(torch.equal(x, y) for x, (y, _) in zip(got, afresh, strict=True))


def test_other_weights_or_views_are_other_files(tiny: ResNet, splits: Splits, tmp_path: Path) -> None:
    epochs(tiny, splits, HEAD, tmp_path)
    assert len(list((tmp_path / "activations").iterdir())) == 3
    epochs(tiny, splits, HEAD, tmp_path, seed=6)  # shares what is not augmented
    assert len(list((tmp_path / "activations").iterdir())) == 5
    with torch.no_grad():
        tiny.layer1[0].bn1.bias += 0.5
    got, expected = epochs(tiny, splits, HEAD, tmp_path), epochs(tiny, splits, HEAD, None)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_a_file_removed_under_a_running_epoch_stays_readable(tiny: ResNet, splits: Splits, tmp_path: Path) -> None:
    data = source(tiny, splits, HEAD, tmp_path)
    before = [x for x, _ in data.train(HEAD, 0)]
    again = data.train(HEAD, 0)
    shutil.rmtree(tmp_path)
    assert all(torch.equal(x, y) for x, (y, _) in zip(before, again, strict=True))
    assert all(torch.equal(x, y) for x, (y, _) in zip(before, data.train(HEAD, 0), strict=True))


def test_prune_removes_what_is_old_and_leaves_a_running_run_alone(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("runs/old", "runs/running", "store/64-squash/old", "store/64-squash/new", "activations/old"):
        folder = own_cache / name
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(5000))
        if not name.endswith("new"):
            for path in (folder / "file", folder):
                os.utime(path, (1e9, 1e9))
    assert run_main(monkeypatch, "data", "cache") == 0
    assert capsys.readouterr().out.count("days ago") == 5
    with exclusive(own_cache / "runs/running"):
        for path in own_cache.glob("runs/running/*"):
            os.utime(path, (1e9, 1e9))
        os.utime(own_cache / "runs/running", (1e9, 1e9))
        assert run_main(monkeypatch, "data", "cache", "--prune", "30") == 0
    assert capsys.readouterr().out.count("removed") == 3
    left = {path.relative_to(own_cache).as_posix() for path in own_cache.glob("*/*") if path.is_dir()}
    assert {"runs/running", "store/64-squash"} <= left
    assert not {"runs/old", "activations/old"} & left
    assert {path.name for path in (own_cache / "store/64-squash").iterdir()} == {"new"}
