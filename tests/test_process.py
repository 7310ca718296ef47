"""How a process starts and ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    begin = "import atexit, gc, os, sys, weakref\nfrom cxr.process import lean_process\n"
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=60)


# Destroyed when Python takes modules apart, which a process that ends at once does not do.
LEFT = "class Left:\n  def __del__(self): os.write(1, b'taken apart')\nleft = Left()\n"


ENDS = [("pass", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(130)", 130)]


@pytest.mark.parametrize(("end", "status"), ENDS)
def test_an_orderly_end_is_at_once_with_its_status(end: str, status: int) -> None:
    result = run_code(f"{LEFT}print('said', end=' ')\nwith lean_process():\n  {end}")
    assert (result.returncode, result.stdout, result.stderr) == (status, "said ", "")


@pytest.mark.parametrize("end", ["sys.exit('why')", "raise ValueError('why')"])
def test_any_other_end_is_python_s_own(end: str) -> None:
    result = run_code(f"{LEFT}with lean_process():\n  {end}")
    assert (result.returncode, result.stdout) == (1, "taken apart")
    assert result.stderr.endswith("why\n")


def test_what_was_registered_for_the_end_is_done() -> None:
    block = "atexit.register(print, 'registered')\n  weakref.finalize(Left, print, 'finalized')"
    result = run_code(f"class Left: pass\nwith lean_process():\n  {block}")
    assert sorted(result.stdout.split()) == ["finalized", "registered"]


def test_a_reader_that_is_gone_is_reported_as_python_does() -> None:
    code = "sys.stdout = open('/dev/full', 'w')\nwith lean_process():\n  print('x')"
    result = run_code(code)
    assert result.returncode == 120
    assert "No space left on device" in result.stderr


def test_garbage_is_collected_rarely_but_is() -> None:
    code = (
        "with lean_process():\n  made = [[] for _ in range(15_000)]\n  assert gc.get_count()[0] > 10_000\n"
        "  class Ring: pass\n  ring = Ring(); ring.own = ring; seen = weakref.ref(ring); del ring\n"
        "  made += [[] for _ in range(15_000)]\n  assert seen() is None"
    )
    assert run_code(code).returncode == 0


def test_the_database_is_one_whole_file_afterwards(tmp_path: Path) -> None:
    code = (
        f"with lean_process():\n  import mlflow\n  from cxr.tracking.store import prepare\n"
        f"  mlflow.set_tracking_uri('sqlite:///{tmp_path}/mlflow.db')\n  prepare()\n"
        "  with mlflow.start_run(): mlflow.log_metric('x', 1.0)\n"
    )
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]
