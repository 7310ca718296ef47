"""End-to-end tests of the command line."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from command import run_main

from cxr import cli as command_line

ROOT = Path(__file__).parent.parent
BAD_OPTIONS = {
    "--strategy": ("halves", "frozen, partial, full, gradual"),
    "--arch": ("vgg16", "resnet18"),
    "--device": ("tpu", "auto, cpu, cuda, mps"),
    "--lr-top": ("-1", "above 0"),
    "--lr-head": ("nan", "finite"),
    "--epochs": ("0", "at least 1"),
    "--batch-size": ("0", "at least 2"),
    "--val-fraction": ("1.5", "at most 0.5"),
    "--data-dir": ("/no/such/folder", "no such folder"),
    "--on-bad-image": ("shrug", "stop, skip"),
}


def test_help_answers_in_under_half_a_second_of_cpu() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cxr", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "train" in result.stdout
    heavy = ("torch", "mlflow", "pandas", "numpy", "sklearn", "matplotlib")
    assert not [name for name in heavy if re.search(rf"\| +{name}$", result.stderr, re.MULTILINE)]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_training_imports_no_optional_packages() -> None:
    optional = ("optuna", "captum", "imagehash", "onnx", "onnxruntime", "kagglehub", "psycopg", "lightning", "mlflow")
    others = (
        "cxr.studies.search",
        "cxr.studies.optuna_study",
        "cxr.studies.compare",
        "cxr.studies.crossval",
        "cxr.runs.evaluate",
        "cxr.runs.verify",
        "cxr.serving.explain",
    )
    code = f"import sys, cxr.runs.train; print([name for name in {optional + others} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_python_dash_m_and_the_module_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = subprocess.run([sys.executable, "-m", "cxr", "--version"], cwd=ROOT, capture_output=True, text=True)
    monkeypatch.setattr(sys, "argv", ["cxr", "--version"])
    command_line.main()
    assert capsys.readouterr().out.split()[-1] == result.stdout.split()[-1]


@pytest.mark.parametrize("option", list(BAD_OPTIONS))
def test_an_invalid_option_prints_one_line_and_exits_with_code_2(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    value, hint = BAD_OPTIONS[option]
    assert run_main(monkeypatch, "train", option, value) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert option in lines[-1]
    assert hint in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_an_invalid_option_creates_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "train", "--epochs", "0") == 2
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_exits_with_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, "train", "--no-such-option", "1") == 2


def test_the_audit_accepts_phantoms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], phantoms: Path
) -> None:
    assert run_main(monkeypatch, "data", "audit", str(phantoms)) == 0
    output = capsys.readouterr().out
    assert "ok   corrupt files: none" in output
    assert "ok   patients in more than one split: 0" in output


def test_audit_names_corrupt_files_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], phantoms: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(phantoms, copy)
    victim = next((copy / "train" / "NORMAL").iterdir())
    victim.write_bytes(b"not an image")
    assert run_main(monkeypatch, "data", "audit", str(copy)) == 1
    assert victim.name in capsys.readouterr().out


def test_a_rank_without_torchrun_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run_main(monkeypatch, "train", "--epochs", "0") == 2
    assert "error: " in capsys.readouterr().err
