"""Runs at work side by side on one machine, each in a process of its own that takes the next one when it is done."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import psutil

from cxr.config import TrainConfig
from cxr.errors import ChildError, MachineError, Stopped, UserError
from cxr.machine import Machine, cores
from cxr.runs.messages import Say
from cxr.runs.train import run_tracked
from cxr.warning_lines import show_warnings_as_lines

CONTEXT: Any = multiprocessing.get_context("spawn")
MEMORY = 3e9  # bytes that a run is taken to need on a CPU, mostly for views or activations
# Of the processes. Threads that spin while they wait keep the others from working.
SETTINGS = {"TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Message = tuple[Literal["said", "finished", "stopped", "failed"], Any]


@dataclass(frozen=True, slots=True)
class Child:
    """A run to be trained: its name among its siblings, its configuration, its ID, and that of its parent."""

    name: str
    config: TrainConfig
    run_id: str
    parent: str

    def train(self, say: Say) -> None:
        """Train it, as `run_tracked`."""
        run_tracked(self.config, say, self.run_id, self.parent)


def at_once(jobs: str, runs: int, machine: Machine, threads: int) -> tuple[int, str]:
    """(how many of the runs are at work side by side, why)."""
    if jobs != "auto":
        return min(int(jobs), runs), f"--jobs {jobs}"
    if machine.device.type == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        return max(1, min(gpus, runs)), f"{gpus} GPU(s)"
    if machine.device.type != "cpu":
        return 1, machine.device.type
    room = int(psutil.virtual_memory().available // MEMORY)
    fit = max(1, min(cores() // threads, room))
    return min(fit, runs), f"{cores()} core(s) of {threads} thread(s) a run, memory for {room}"


def train_side_by_side(children: Iterable[Child], processes: int, say: Say) -> None:
    """Train all children, `processes` at once; what one says is said after its name.

    The first that fails stops the others, which end KILLED and can be continued. Raises what it raised: `UserError`, or
    `ChildError` with its traceback; `MachineError` when its process was killed; `Stopped` when it was stopped.
    """
    waiting = deque(children)
    threads = max(child.config.threads for child in waiting)
    workers = [_Worker(number, threads) for number in range(min(processes, len(waiting)))]
    try:
        for worker in workers:
            worker.take(waiting)
        while busy := {worker.connection: worker for worker in workers if worker.child}:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                busy[connection].answer(waiting, say)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that trains one child after the other, as seen by the one that hands them out."""

    def __init__(self, number: int, threads: int):
        import mlflow
        import torch

        self.connection, other = CONTEXT.Pipe()
        stores = (mlflow.get_tracking_uri(), mlflow.get_registry_uri())
        self.process: BaseProcess = CONTEXT.Process(target=_serve, args=(other, stores), daemon=True)
        limits = dict.fromkeys(THREADS, str(threads)) if threads else {}
        with _environment(SETTINGS | limits | _one_gpu(number, torch.cuda.device_count())):
            self.process.start()
        other.close()
        self.child: Child | None = None

    def take(self, waiting: deque[Child]) -> None:
        """Take the next child, if there is one."""
        self.child = waiting.popleft() if waiting else None
        if self.child:
            self.connection.send(self.child)

    def answer(self, waiting: deque[Child], say: Say) -> None:
        """Deal with what the process has to say."""
        assert self.child
        try:
            kind, content = self.connection.recv()
        except EOFError as error:
            self.process.join()
            raise MachineError(
                f"{self.child.name}: the process of run {self.child.run_id} was killed (exit code "
                f"{self.process.exitcode}), perhaps for memory; repeat the command to go on, with fewer --jobs"
            ) from error
        if kind == "said":
            for line in filter(None, content.splitlines()):
                say(f"{self.child.name}: {line}")
        elif kind == "finished":
            self.take(waiting)
        elif kind == "stopped":
            raise Stopped(self.child.name)
        else:
            raise content if isinstance(content, UserError) else ChildError(f"{self.child.name}:\n{content}")

    def end(self) -> None:
        """Stop what is being trained, and wait until it has ended."""
        if self.child:
            self.process.terminate()
        self.connection.close()
        self.process.join()


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """For processes started within the block, whose libraries read these variables when they are loaded."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _one_gpu(number: int, gpus: int) -> dict[str, str]:
    """What lets a process see one of several GPUs: they take turns."""
    if gpus < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": names[number % gpus]}


def _serve(connection: Connection, stores: tuple[str, str]) -> None:
    """What the process does: train what it is given, until there is no more or a run fails."""
    import mlflow

    show_warnings_as_lines()
    mlflow.set_tracking_uri(stores[0])
    mlflow.set_registry_uri(stores[1])
    while (child := _next(connection)) is not None:
        message = _trained(child, connection)
        try:
            connection.send(message)
        except OSError:  # nobody is there to be told any more; the run has ended as it should
            return
        if message[0] != "finished":
            return


def _next(connection: Connection) -> Child | None:
    try:
        child: Child = connection.recv()
    except (EOFError, KeyboardInterrupt):
        return None
    return child


def _trained(child: Child, connection: Connection) -> Message:
    try:
        child.train(lambda line: connection.send(("said", line)))
    except UserError as error:
        return "failed", error
    except (KeyboardInterrupt, Stopped):
        return "stopped", ""
    except Exception:
        return "failed", traceback.format_exc()
    return "finished", ""
