from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr.errors import UserError
from cxr.machine import (
    cpu_has_bf16,
    describe,
    resolve_compile,
    resolve_device,
    resolve_precision,
    seed_everything,
)
from cxr.storage import Cache

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def present(monkeypatch: pytest.MonkeyPatch, cuda: bool = False, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_selects_the_fastest_available_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, chosen: str
) -> None:
    present(monkeypatch, cuda, mps)
    assert resolve_device("auto").type == chosen
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_unavailable_device_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    present(monkeypatch)
    with pytest.raises(UserError, match=f"--device {name}.*--device auto or cpu"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("name", "device", "bf16", "chosen"),
    [
        ("auto", CPU, True, "fp32"),
        ("auto", MPS, False, "fp16"),
        ("auto", CUDA, True, "bf16"),
        ("auto", CUDA, False, "fp16"),
        ("fp32", CUDA, True, "fp32"),
        ("bf16", CPU, False, "bf16"),
        ("fp16", CUDA, True, "fp16"),
    ],
)
def test_precision(monkeypatch: pytest.MonkeyPatch, name: str, device: torch.device, bf16: bool, chosen: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert resolve_precision(name, device) == chosen


def test_fp16_is_rejected_on_the_cpu() -> None:
    with pytest.raises(UserError, match="--precision fp16"):
        resolve_precision("fp16", CPU)


def test_steps_are_recorded_on_one_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [resolve_compile("auto", device) for device in (CPU, CUDA, MPS)] == ["none", "graphs", "none"]
    assert resolve_compile("none", CUDA) == "none"
    with pytest.raises(UserError, match="--compile graphs: CUDA graphs require a GPU"):
        resolve_compile("graphs", CPU)
    monkeypatch.setattr("cxr.machine.processes", lambda: 2)
    assert resolve_compile("auto", CUDA) == "none"
    with pytest.raises(UserError, match="--compile inductor: not supported under torchrun"):
        resolve_compile("inductor", CUDA)


def test_the_cache_folder_is_looked_up_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXR_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Cache.open(str(tmp_path / "named")).root == tmp_path / "named"
    assert Cache.open().root == tmp_path / "own"
    monkeypatch.delenv("CXR_CACHE")
    assert Cache.open().root == tmp_path / "xdg" / "cxr"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert Cache.open().root == tmp_path / "home" / ".cache" / "cxr"
    assert (tmp_path / "home" / ".cache" / "cxr").is_dir()


def test_a_cache_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache-dir .*file/cache: cannot be made \(Not a directory\)"):
        Cache.open(str(tmp_path / "file" / "cache"))


def test_an_unknown_home_folder_is_rejected_as_cache() -> None:
    with pytest.raises(UserError, match="--cache-dir ~no-such-user/cache: cannot be made"):
        Cache.open("~no-such-user/cache")


def test_a_named_cache_needs_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("CXR_CACHE", str(tmp_path / "own"))
    assert Cache.open().root == tmp_path / "own"


def test_the_same_seed_gives_the_same_numbers_everywhere() -> None:
    def numbers(seed: int) -> list[float]:
        seed_everything(seed, CPU)
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]

    assert numbers(3) == numbers(3)
    assert all(a != b for a, b in zip(numbers(3), numbers(4), strict=True))
    assert len(numbers(2**40)) == 3  # exceeds NumPy's 32-bit seed


def test_bf16_requires_the_cpu_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (("avx512f amx_bf16", True), ("avx2 avx512_bf16", True), ("avx2 avx512f", False)):
        monkeypatch.setattr(Path, "read_text", lambda _, flags=flags: f"flags : {flags}\n")
        monkeypatch.setattr(Path, "exists", lambda _: True)
        assert cpu_has_bf16() is expected


def test_the_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    assert describe(CUDA) == "cuda (NVIDIA H100)"
    assert describe(MPS) == "mps"
    assert describe(CPU) == f"cpu ({torch.get_num_threads()} threads)"
