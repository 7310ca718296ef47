"""Processes that train runs for another."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from command import run_main

from cxr.studies import worker

LOADED = """
import os, sys
from cxr.studies import worker

def tell(before):
    modules = [name for name in ("torch", "mlflow.pyfunc", "captum", "cxr.runs.train") if name in sys.modules]
    print(len(modules), os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"], flush=True)

if __name__ == "__main__":
    os.environ.pop("OMP_WAIT_POLICY", None)
    worker.warm_up(3)
    assert "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ
    process = worker.CONTEXT.Process(target=tell, args=(0,))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they are not forked")
def test_libraries_are_loaded_and_their_settings_made_before_a_process_is_started(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOADED)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "4 PASSIVE 3\n", "")


def test_a_process_that_is_not_forked_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(worker, "CONTEXT", spawn)
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
