"""A process that trains one run after the other for the one that started it.

It imports what it needs when it is set up, not before: see `cxr.process`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from cxr.errors import Stopped
from cxr.process import lean_process
from cxr.storage import own_temporary_files
from cxr.tracking.signals import stops_once

if TYPE_CHECKING:
    from cxr.studies.child import Child


def serve(connection: Connection, stores: tuple[str, str]) -> None:
    """Train what the connection gives, logging to `stores`, until there is no more or a run fails."""
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
