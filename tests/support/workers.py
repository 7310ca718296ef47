"""Worker processes of a comparison that tests may use: forked, with the narrow network, and without plots."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from multiprocessing.connection import Connection

import pytest
from as_tests_run import fail_where, run_as_tests_do
from started import CONTEXT, one_thread

from cxr.studies import family, side_by_side
from cxr.studies.worker import serve


def _serve_narrow(
    errors: dict[str, Exception], connection: Connection, stores: tuple[str, str], environment: Mapping[str, str]
) -> None:
    fail_where(lambda child: errors.get(child.config.strategy))
    os.environ.update(environment)
    run_as_tests_do()
    serve(connection, stores, environment)


def fork_workers(monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception] | None = None) -> None:
    """From now on, the processes of `side_by_side` are such workers; runs of a strategy may raise an error."""
    one_thread(monkeypatch)
    monkeypatch.setattr(side_by_side, "context", lambda: CONTEXT)
    monkeypatch.setattr(family, "warm_up", lambda threads: None)  # the server of the tests is there
    monkeypatch.setattr(side_by_side, "serve", partial(_serve_narrow, errors or {}))
