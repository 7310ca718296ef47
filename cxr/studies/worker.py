"""A process that trains one run after the other for the one that started it.

On Linux, such processes are forked from one that has loaded the libraries (`preload`) and done nothing else. Elsewhere,
and where the folder for temporary files has a very long name, each loads them itself, once it is set up (see
`cxr.process`), which takes several seconds of a core.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from cxr.errors import Stopped
from cxr.process import lean_process
from cxr.storage import own_temporary_files
from cxr.tracking.signals import stops_once

if TYPE_CHECKING:
    from cxr.studies.child import Child


LONGEST = 70  # bytes of the folder for temporary files, so that a socket in it has a name that Linux allows
# Threads that spin while they wait keep the others from working.
SETTINGS = {"TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def context() -> Any:
    """How processes are started and what connects them, as in `multiprocessing`."""
    forks = sys.platform == "linux" and len(os.fsencode(tempfile.gettempdir())) <= LONGEST
    return multiprocessing.get_context("forkserver" if forks else "spawn")


def settings_for(threads: int) -> dict[str, str]:
    """Environment variables of a process with so many threads (0: all)."""
    return SETTINGS | (dict.fromkeys(THREADS, str(threads)) if threads else {})


def warm_up(threads: int) -> None:
    """Begin to load the libraries for the processes that will be started. Does not wait."""
    processes = context()
    if processes.get_start_method() != "forkserver":
        return
    processes.set_forkserver_preload(["cxr.studies.preload"])
    before = dict(os.environ)
    os.environ.update(settings_for(threads))  # which libraries read when they are loaded
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def serve(connection: Connection, stores: tuple[str, str], environment: Mapping[str, str]) -> None:
    """Train what the connection gives, logging to `stores`, until there is no more or a run fails.

    `environment` takes the place of the process's own, which may be that of the process it was forked from.
    """
    os.environ.clear()
    os.environ.update(environment)
    with lean_process(), suppress(KeyboardInterrupt, Stopped), stops_once(), own_temporary_files():
        _train_all(connection, stores)


def _train_all(connection: Connection, stores: tuple[str, str]) -> None:
    from cxr.studies.child import use_stores

    use_stores(stores)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while (child := _next(connection)) is not None:
        message = child.trained(lambda line: connection.send(("said", line)))
        try:
            connection.send(message)
        except OSError:  # nobody is there to be told any more; the run has ended as it should
            return
        if message[0] != "finished":
            return


def _end_with_parent() -> None:
    """Have the run end, which can be continued, as soon as the process that handed it out is gone."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _next(connection: Connection) -> Child | None:
    try:
        child: Child = connection.recv()
    except (EOFError, KeyboardInterrupt):
        return None
    return child
