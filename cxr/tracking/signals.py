"""What SIGINT and SIGTERM do to a run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

from cxr.errors import Stopped

# What is at work while a transaction may be open. Broken off in the middle, it leaves the database locked for all.
_TRANSACTIONS = (
    "sqlalchemy.",
    "mlflow.store.db.",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "optuna.storages._rdb",
)
# Between the store's answer and MLflow's memory of it, a run would be left RUNNING that nobody knows; between the start
# of a thread and the memory of it, a pool would have a thread that nothing ends, and the process would never exit.
_WHOLE = (
    ("mlflow.tracking.fluent", "start_run"),
    ("mlflow.tracking.fluent", "end_run"),
    ("concurrent.futures.thread", "submit"),
)
_AGAIN = 0.02  # seconds


@contextmanager
def handlers(chosen: Mapping[int, Any]) -> Iterator[None]:
    """Signal handlers for a block; only the main thread may set them, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in chosen.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stops_once() -> Iterator[list[int]]:
    """Within the block, SIGTERM unwinds the stack like Ctrl-C, and what follows the first of either is ignored.

    On Ctrl-C, `mlflow run` sends SIGTERM after the terminal's SIGINT: the second must not break off the ending. Neither
    breaks off a transaction: it is heard when that is over. Yields a list that holds the signal once it is heard.
    """
    heard: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if in_transaction(frame):
            send_again(number)
            return
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        heard.append(number)
        raise _stop(number)

    with handlers({signal.SIGTERM: stop, signal.SIGINT: stop}):
        yield heard


def _stop(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped("SIGTERM")


@contextmanager
def stop_shown(heard: Sequence[int]) -> Iterator[None]:
    """A stop that compiled code has turned into an error of its own, as PyTorch's does, is a stop again."""
    try:
        yield
    except Exception as error:
        if heard:
            raise _stop(heard[0]) from error
        raise


def in_transaction(frame: FrameType | None) -> bool:
    """Whether the interrupted code may be in the middle of a database transaction, or of opening or ending a run."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(_TRANSACTIONS) or (module, frame.f_code.co_name) in _WHOLE:
            return True
        frame = frame.f_back
    return False


def send_again(number: int) -> None:
    """Have this process receive the signal again in a moment."""
    timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _signals_ignored() -> AbstractContextManager[None]:
    """A second Ctrl-C must not keep a run from being ended."""
    return handlers({signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: signal.SIG_IGN})
