"""`python -m cxr` in a process of its own, without the seconds that an interpreter takes to import torch and MLflow.

The processes are forked from a server that has imported them and done nothing else. All else is as in a new one: its
arguments, its environment, its folder, what it prints, its signals and its exit code. Runs may use the narrow network,
and save no plots.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

import pytest
from as_tests_run import run_as_tests_do

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mlflow", "mlflow.pyfunc", "cxr.runs.train", "cxr.studies.search", "started"])


def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the server, which the first process starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))


def _become(arguments: tuple[str, ...], environment: dict[str, str], out: Connection) -> None:
    """What `python -m cxr` does, in the forked process."""
    import cxr.runs.record  # noqa: F401

    for number in (1, 2):
        os.dup2(out.fileno(), number)
    out.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = ["cxr", *arguments]
    run_as_tests_do()
    runpy.run_module("cxr", run_name="__main__", alter_sys=True)


class Started:
    """As `subprocess.Popen` of `python -m cxr`, both streams in `stdout`."""

    def __init__(self, *arguments: str, **environment: str):
        reader, writer = CONTEXT.Pipe(duplex=False)
        given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = CONTEXT.Process(target=_become, args=(arguments, given, writer))
        with pytest.MonkeyPatch.context() as patch:
            one_thread(patch)
            self._process.start()
        writer.close()
        self.stdout: IO[str] = os.fdopen(os.dup(reader.fileno()))
        reader.close()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, timeout: float = 200) -> tuple[int, str]:
        """(exit code, negative for a signal, and the rest of what it printed) once it has ended."""
        with self.stdout:
            output = self.stdout.read()
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"still running after {timeout} s"
        return code, output
