"""What `cxr data check` prints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import run_main
from dicoms import as_dicoms


def test_a_source_is_described_with_the_command_to_train(
    phantoms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "data", "check", str(phantoms), "--labels", "subtype") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "classes: NORMAL, BACTERIA, VIRUS" in lines
    assert [line.split(":")[0] for line in lines if line.startswith(("train:", "val:", "test:"))][:3] == [
        "train",
        "val",
        "test",
    ]
    assert "sizes: 64x64 to 64x64, median 64x64" in lines
    assert lines[-1] == f"train: cxr train --data-dir {phantoms} --labels subtype"
    assert any("NORMAL" in line and line.strip().startswith("train/") for line in lines)


def test_what_is_odd_is_named(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    first, second, third = sorted((folder / "train/NORMAL").iterdir())[:3]
    first.write_bytes(b"no image")
    shutil.copy(second, third)
    assert run_main(monkeypatch, "data", "check", str(folder)) == 0
    odd = [line for line in capsys.readouterr().out.splitlines() if line.startswith("odd: ")]
    assert f"odd: 1 files whose header cannot be read (train/NORMAL/{first.name})" in odd
    assert "odd: 1 images are copies of others, byte for byte" in odd
    assert any(line.startswith("odd: test has only") for line in odd)


def test_dicom_files_are_told_with_their_bits_and_size(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_dicoms(phantoms, tmp_path / "films")
    assert run_main(monkeypatch, "data", "check", str(folder), "--cache-dir", str(tmp_path / "cache")) == 0
    lines = capsys.readouterr().out.splitlines()
    count = len(list(folder.glob("*/*/*.dcm")))
    assert f"formats: DICOM MONOCHROME2 8-bit {count}" in lines
    assert "sizes: 64x64 to 64x64, median 64x64" in lines
    assert not any("header cannot be read" in line for line in lines)
