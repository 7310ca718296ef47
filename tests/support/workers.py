"""Worker processes of a comparison that tests may use: forked, with the narrow network, and without plots."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import pytest
from narrow import allow
from placeholder import leave_plots_out
from started import CONTEXT, one_thread
from unsynced import write_behind

from cxr.studies import side_by_side
from cxr.studies.child import Child

_serve = side_by_side._serve


def _serve_narrow(
    environment: dict[str, str], errors: dict[str, Exception], connection: Connection, stores: tuple[str, str]
) -> None:
    train = Child.train

    def fail(child: Child, say: Callable[[str], object]) -> None:
        if error := errors.get(child.config.strategy):
            raise error
        train(child, say)

    Child.train = fail  # type: ignore[method-assign]
    os.environ.clear()
    os.environ.update(environment)
    allow()
    leave_plots_out(pytest.MonkeyPatch())
    write_behind()
    _serve(connection, stores)


def fork_workers(monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception] | None = None) -> None:
    """From now on, the processes of `side_by_side` are such workers; runs of a strategy may raise an error."""
    one_thread(monkeypatch)
    monkeypatch.setattr(side_by_side, "CONTEXT", CONTEXT)
    monkeypatch.setattr(side_by_side, "_serve", partial(_serve_narrow, dict(os.environ), errors or {}))
