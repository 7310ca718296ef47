"""Processes that train runs for another."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import run_main

from cxr.studies import worker

LOADED = """
import os, sys
from cxr.studies import worker

def tell():
    modules = [name for name in ("torch", "mlflow.pyfunc", "captum", "cxr.runs.train") if name in sys.modules]
    print(len(modules), os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"], flush=True)

if __name__ == "__main__":
    os.environ.pop("OMP_WAIT_POLICY", None)
    worker.warm_up(3)
    assert "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ
    process = worker.context().Process(target=tell)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are not forked")
def test_libraries_are_loaded_and_their_settings_made_before_a_process_is_started(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOADED)
    environment = os.environ | {"TMPDIR": "/tmp"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "4 PASSIVE 3\n", "")


def test_a_process_that_is_not_forked_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(worker, "context", lambda: spawn)
    worker.warm_up(1)  # there is nothing to begin
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=worker.serve, args=(theirs, ("", ""), worker.settings_for(1)))
    process.start()
    theirs.close()
    ours.close()  # there is no run to train
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("command", "jobs", "expected"),
    [("compare", "2", [3]), ("crossval", "2", [3]), ("compare", "1", []), ("compare", "auto", [])],
)
def test_the_libraries_begin_to_load_at_once_where_jobs_are_named(
    command: str, jobs: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(worker, "warm_up", begun.append)
    assert run_main(monkeypatch, command, "--jobs", jobs, "--threads", "3", "--data-dir", "/no/such/folder") == 2
    assert begun == expected


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


def compare(phantoms: Path, folder: Path, temporary: Path, strategies: str) -> subprocess.CompletedProcess[str]:
    about = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "CXR_CACHE": f"{folder}/cache"}
    few = ["--image-size", "32", "--epochs", "1", "--seeds", "1", "--bootstrap", "20", "--figures", "few"]
    given = ["--data-dir", str(phantoms), "--weights", "random", "--strategies", strategies, "--register", "none"]
    return subprocess.run(
        [sys.executable, "-m", "cxr", "compare", "--jobs", "2", *few, *given],
        env=os.environ | about | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", ["short", "long"])
def test_a_comparison_with_such_processes_leaves_nothing_behind(
    length: str, phantoms: Path, tmp_path: Path, short_folder: Path
) -> None:
    """They are forked, or, where the folder for temporary files has a long name, not."""
    temporary = short_folder if length == "short" else tmp_path / ("x" * worker.LONGEST)
    temporary.mkdir(exist_ok=True)
    result = compare(phantoms, tmp_path, temporary, "frozen,partial")
    assert result.returncode == 0, result.stderr
    assert "2 at once (--jobs 2)" in result.stdout
    assert "Traceback" not in result.stderr + result.stdout
    assert not [path for path in temporary.iterdir() if path.name.startswith(("cxr", "pymp"))]


def test_bad_input_ends_them_too(phantoms: Path, tmp_path: Path, short_folder: Path) -> None:
    result = compare(tmp_path / "nowhere", tmp_path, short_folder, "frozen,partial")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert not [path for path in short_folder.iterdir() if path.name.startswith(("cxr", "pymp"))]
