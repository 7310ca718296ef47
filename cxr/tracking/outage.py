"""A tracking store that does not answer for a while: what counts as that, and how long a run waits.

MLflow retries a request for seconds. Its asynchronous logging keeps what is not delivered in memory, gives up after the
same few retries, and loses it with the process; so waiting is done here, and `outbox.py` keeps what waits on disk.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import ParamSpec, TypeVar

from cxr.config import without_password

T = TypeVar("T")
P = ParamSpec("P")
RETRY = 2.0  # seconds between two attempts
_TRANSIENT = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
_FULL = ("database or disk is full", "readonly database")  # of SQLite: waiting would not help


def is_outage(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, means that the store may answer the same request later."""
    while error is not None:
        if _is_outage(error):
            return True
        error = error.__cause__
    return False


def _is_outage(error: BaseException) -> bool:
    import requests
    from mlflow.exceptions import MlflowException, RestException
    from sqlalchemy.exc import InterfaceError, OperationalError

    text = str(error)
    if any(words in text for words in _FULL):
        return False
    if isinstance(error, MlflowException):
        lost = "API request to" in text and "failed with" in text  # no answer, or one with status 5xx after retries
        inside = isinstance(error, RestException) and error.error_code == "INTERNAL_ERROR"
        return error.error_code in _TRANSIENT or lost or inside or "InterfaceError" in text
    if isinstance(error, requests.HTTPError):
        return error.response is not None and (error.response.status_code >= 500 or error.response.status_code == 429)
    return isinstance(
        error,
        ConnectionError | OperationalError | InterfaceError | requests.ConnectionError | requests.Timeout,
    )


class Outage:
    """Whether the store answers, as this process last saw it. One line says when that ends, one when it answers again.

    `name` gives the store in these lines. `patience` is how long a call waits, in seconds: none before training, so
    that a wrong address is said at once.
    """

    def __init__(self, name: Callable[[], str]) -> None:
        self.name = name
        self.patience = 0.0
        self.say: Callable[[str], object] = print
        self._since: float | None = None
        self._lock = Lock()

    @property
    def lasts(self) -> bool:
        """Whether the store did not answer the last call."""
        return self._since is not None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Patience and `say` are after the block what they were before it."""
        before = self.patience, self.say
        try:
            yield
        finally:
            self.patience, self.say = before

    def allow(self, minutes: float, say: Callable[[str], object]) -> None:
        """From now on, wait so long, and say so by `say`."""
        self.patience, self.say = minutes * 60, say

    def began(self, error: BaseException) -> None:
        """Note a call that was not answered, and say so if it is the first."""
        with self._lock:
            first, self._since = self._since is None, self._since or time.monotonic()
        if first:
            self.say(
                f"{self.name()} does not answer ({reason_of(error)}); the run goes on, and waits for it up to "
                f"{self.patience / 60:g} minutes where it has to (--tracking-patience)"
            )

    def ended(self) -> None:
        """Note a call that was answered, and say so after an outage."""
        with self._lock:
            since, self._since = self._since, None
        if since is not None:
            self.say(f"{self.name()} answers again, after {time.monotonic() - since:.0f} s")

    def ride_out(self, call: Callable[[], T]) -> T:
        """The result of a call that may safely be repeated, which waits up to `patience` seconds for the store.

        Raises what the call raises when the patience is spent, or waiting would not help.
        """
        until = time.monotonic() + self.patience
        while True:
            try:
                result = call()
            except Exception as error:
                if time.monotonic() >= until or not is_outage(error):
                    raise
                self.began(error)
            else:
                self.ended()
                return result
            time.sleep(RETRY)


OUTAGE = Outage(lambda: f"MLflow at {store_address()}")  # of this process: all that it does goes to one store


def waits(function: Callable[P, T]) -> Callable[P, T]:
    """A function that asks the store and may safely be repeated: it waits for the store as `OUTAGE` allows."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return OUTAGE.ride_out(lambda: function(*args, **kwargs))

    return call


def store_address() -> str:
    """The tracking URI, without a password."""
    import mlflow

    return without_password(mlflow.get_tracking_uri())


def pages_address() -> str:
    """The address of MLflow's pages: that of a server, else that of `mlflow ui`."""
    uri = store_address()
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


def reason_of(error: BaseException) -> str:
    """The first line of an error of the store; of a failed request, the innermost cause.

    Optuna hides the database's own error behind a sentence that fits all of them.
    """
    own = error.__cause__ if type(error).__name__ == "StorageInternalError" and error.__cause__ else error
    text = (str(own).strip().splitlines() or [type(own).__name__])[0]
    if cause := re.search(r"Caused by \w+\((.*)", text):
        text = cause[1].rpartition(": ")[2].strip("'\")>")
    return text[:200]
