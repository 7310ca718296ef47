"""Runs at work side by side on one machine, each in a process of its own that takes the next one when it is done."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import psutil

from cxr.config import TrainConfig
from cxr.errors import MachineError
from cxr.machine import Machine, cores
from cxr.runs.messages import Say
from cxr.studies.child import Child, end_lost, stores_in_use
from cxr.studies.worker import context, serve, settings_for

PATIENCE = 60.0  # seconds that a run has to end when it is stopped
MEMORY = 3e9  # bytes that a run is taken to need on a CPU, mostly for views or activations


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


def train_side_by_side(
    children: Iterable[Child], processes: int, say: Say, first: Callable[[], object] = lambda: None
) -> None:
    """Train all children, `processes` at once, the costly ones of a seed first, so that none is left alone at the end.

    `first` is done while the processes start. What one says is said after its name.

    The first that fails stops the others, which end KILLED and can be continued. Raises what it raised: `UserError`, or
    `ChildError` with its traceback; `MachineError` when its process was killed; `Stopped` when it was stopped.
    """
    waiting = deque(sorted(children, key=lambda child: (child.config.seed, -_cost(child.config))))
    threads = max(child.config.threads for child in waiting)
    workers = [_Worker(number, threads) for number in range(min(processes, len(waiting)))]
    try:
        first()
        for worker in workers:
            worker.take(waiting)
        while busy := {worker.connection: worker for worker in workers if worker.child}:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                busy[connection].answer(waiting, say)
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.end()


def _cost(config: TrainConfig) -> int:
    """How many stages are trained, counted once an epoch: enough to tell `full` from `frozen`."""
    return config.epochs * sum(len(phase.trainable) for phase in config.phases)


class _Worker:
    """A process that trains one child after the other, as seen by the one that hands them out."""

    def __init__(self, number: int, threads: int):
        import torch

        self.connection, other = context().Pipe()
        environment = {**os.environ, **settings_for(threads), **_one_gpu(number, torch.cuda.device_count())}
        about = (other, stores_in_use(), environment)
        self.process: BaseProcess = context().Process(target=serve, args=about, daemon=True)
        self.process.start()
        other.close()
        self.child: Child | None = None

    def take(self, waiting: deque[Child]) -> None:
        """Take the next child, if there is one."""
        self.child = waiting.popleft() if waiting else None
        if self.child:
            try:
                self.connection.send(self.child)
            except OSError as error:
                raise self._killed() from error

    def answer(self, waiting: deque[Child], say: Say) -> None:
        """Deal with what the process has to say."""
        assert self.child
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._killed() from error
        if kind == "said":
            for line in filter(None, content.splitlines()):
                say(f"{self.child.name}: {line}")
        else:
            self.child.require_finished((kind, content))
            self.take(waiting)

    def _killed(self) -> MachineError:
        """What to raise when the process is gone; its run, which could not end itself, is ended."""
        assert self.child
        self.process.join()
        end_lost(self.child, "its process was killed")
        return MachineError(
            f"{self.child.name}: the process of run {self.child.run_id} was killed (exit code "
            f"{self.process.exitcode}), perhaps for memory; repeat the command to go on, with fewer --jobs"
        )

    def stop(self) -> None:
        """Have what is being trained end, or the process if it waits."""
        if self.child:
            self.process.terminate()
        self.connection.close()

    def end(self) -> None:
        """Wait until the process has ended; one that does not is killed."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            if self.child:
                end_lost(self.child, "its process did not stop")


def _one_gpu(number: int, gpus: int) -> dict[str, str]:
    """What lets a process see one of several GPUs: they take turns."""
    if gpus < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": names[number % gpus]}
