"""Runs as tasks of a Ray cluster. Its scheduler decides where and when; what is lost with a node is tried again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cxr.errors import ChildError, InUseError, MachineError, UserError
from cxr.runs.messages import Say
from cxr.runs.resume import has_checkpoint
from cxr.studies.child import Child, Message, end_lost, stores_in_use, use_stores
from cxr.tracking.nested import children, is_finished
from cxr.tracking.reading import LoggedRun, Tag

RETRIES = 3  # of one run, each after its process or node was lost
POLL = 2.0  # seconds between two looks at what the runs have logged
PATIENCE = 30.0  # seconds that runs have to end when the comparison is stopped
IN_USE = 5.0  # seconds until a run is tried again whose last attempt has not let go of it yet
Renew = Callable[[Child], Child]


def train_on_ray(family: Iterable[Child], most: int | None, say: Say, renew: Renew) -> None:
    """Train all children as tasks, `most` at once (None: as many as the cluster takes).

    A run whose node or process is lost continues on another if the cache folder is shared, else `renew` makes a new one
    for it. Raises `UserError` when Ray is not installed or cannot be reached, and for a store that other machines
    cannot reach; the first error of a run is raised once, and stops the others.
    """
    ray = _connected()
    stores = stores_in_use()
    _require_reachable(ray, stores)
    tasks = _Tasks(ray, stores, say)
    waiting, tries = deque(family), Counter[str]()
    _require_room(ray, waiting)
    try:
        for child in waiting:  # Ray ends the tasks of a driver that died, which cannot say so
            end_lost(child, "its driver ended")
        while waiting or tasks.running:
            while waiting and (most is None or len(tasks.running) < most):
                tasks.start(waiting.popleft())
            waiting += _settled(tasks.ended(), tries, say, renew)
    finally:
        tasks.stop()


def _settled(ended: Iterable[tuple[Child, Message]], tries: Counter[str], say: Say, renew: Renew) -> list[Child]:
    """What is to be tried again of the tasks that have ended. Raises the first error, once all are dealt with."""
    again, errors = [], []
    for child, message in ended:
        try:
            if message[0] == "begin again":
                again.append(renew(child))
            elif message[0] in ("lost", "stopped") or isinstance(message[1], InUseError):
                again += _again(child, message[1], tries, say)
            else:
                child.require_finished(message)
                say(f"{child.name}: finished, run {child.run_id}")
        except (UserError, ChildError) as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return again


def _again(child: Child, reason: Any, tries: Counter[str], say: Say) -> list[Child]:
    """The same child once more, unless it had finished when it was lost. Raises `MachineError` if it was lost too
    often."""
    if is_finished(child.run_id):
        say(f"{child.name}: finished, run {child.run_id}")
        return []
    reason = reason or "stopped"  # such as a node that is given to somebody else
    if not isinstance(reason, InUseError):
        end_lost(child, str(reason))
    tries[child.name] += 1
    if tries[child.name] > RETRIES:
        raise MachineError(f"{child.name}: run {child.run_id} was lost {tries[child.name]} times ({reason})")
    if isinstance(reason, InUseError):
        time.sleep(IN_USE)
    else:
        say(f"{child.name}: lost ({reason}); run {child.run_id} is tried again")
    return [child]


def _connected() -> Any:
    """The module `ray`, connected to RAY_ADDRESS, else to a cluster of this machine alone."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else its workers are started by `uv run`, too
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray: Ray is not installed; install the extra `ray` (uv sync --extra ray)") from error
    if not ray.is_initialized():
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise MachineError(f"--engine ray: no cluster could be used ({reason}); check RAY_ADDRESS") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray's own would end the parent as failed
    return ray


def _require_reachable(ray: Any, stores: tuple[str, str]) -> None:
    own = {socket.gethostname(), ray.util.get_node_ip_address()}
    names = [(node["NodeManagerHostname"], node["NodeManagerAddress"]) for node in _alive(ray)]
    others = [host for host, address in names if not own & {host, address}]
    local = [uri for uri in stores if uri.startswith(("sqlite:", "file:", "/", "./"))]
    if others and local:
        raise UserError(
            f"--engine ray: {others[0]} cannot log to {local[0]}; start an MLflow server and set MLFLOW_TRACKING_URI"
        )


def _require_room(ray: Any, family: Iterable[Child]) -> None:
    """Ray would wait for ever for a node with more CPUs than any has."""
    threads = max((child.config.threads for child in family), default=1)
    largest = max(node["Resources"].get("CPU", 0) for node in _alive(ray))
    if threads > largest:
        raise UserError(
            f"--engine ray: a run takes {threads} threads, and no node has more than {largest:g}; use --threads"
        )


def _alive(ray: Any) -> list[Mapping[str, Any]]:
    """The nodes that are there."""
    return [node for node in ray.nodes() if node["Alive"]]


class _Tasks:
    """The tasks that are at work, and what they have logged."""

    def __init__(self, ray: Any, stores: tuple[str, str], say: Say):
        self.ray, self.stores, self.say = ray, stores, say
        self.running: dict[Any, Child] = {}
        self._seen: dict[str, float] = {}
        self._task = ray.remote(_train)

    def start(self, child: Child) -> None:
        """Hand a child to the cluster; a task gets the threads of its run, and a GPU where there are any."""
        gpus = self.ray.cluster_resources().get("GPU", 0) and child.config.device in ("auto", "cuda")
        needs = {"num_cpus": max(1, child.config.threads), "num_gpus": 1 if gpus else 0, "max_retries": 0}
        settings = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "CXR_"))}
        settings.pop("MLFLOW_RUN_ID", None)
        self.running[self._task.options(**needs).remote(child, self.stores, settings)] = child

    def ended(self) -> list[tuple[Child, Message]]:
        """Those that have ended within `POLL` seconds, and how; says what the others have logged meanwhile."""
        done, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=POLL)
        found = [(self.running.pop(reference), self._message(reference)) for reference in done]
        if self.running:
            self._tell(next(iter(self.running.values())).parent)
        return found

    def _message(self, reference: Any) -> Message:
        try:
            message: Message = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:  # such as another version of cxr on the node
            return "failed", str(error)
        except self.ray.exceptions.RayError as error:
            return "lost", type(error).__name__
        return message

    def _tell(self, parent: str) -> None:
        names = {child.run_id: child.name for child in self.running.values()}
        for run in children(parent):
            loss = run.metrics.get("val_loss")
            if run.run_id in names and loss is not None and self._seen.get(run.run_id) != loss:
                self._seen[run.run_id] = loss
                self.say(f"{names[run.run_id]}: val_loss {loss:.4f}, on {run.tags.get(Tag.HOST)}")

    def stop(self) -> None:
        """Interrupt what is at work, and wait until it has ended."""
        for reference in self.running:
            self.ray.cancel(reference, force=False)
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=PATIENCE)


def _train(child: Child, stores: tuple[str, str], settings: Mapping[str, str]) -> Message:
    """The task, on some node: train, unless the checkpoint of an earlier attempt is out of reach."""
    os.environ.pop("MLFLOW_RUN_ID", None)
    os.environ.update(settings, TQDM_DISABLE="1")
    use_stores(stores)
    try:
        if not has_checkpoint(LoggedRun.open(child.run_id), child.config):
            return "begin again", ""
    except UserError as error:
        return "failed", type(error)(f"on {socket.gethostname()}: {error}")
    return child.trained(lambda line: None)
