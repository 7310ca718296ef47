"""What processes do in which tests let runs train."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from narrow import allow
from placeholder import leave_plots_out
from unsynced import write_behind

if TYPE_CHECKING:
    from cxr.studies.child import Child


def run_as_tests_do() -> None:
    """From now on, runs of this process may use the narrow network, save no plots, and do not wait for the disk."""
    allow()
    leave_plots_out(pytest.MonkeyPatch())
    write_behind()


def fail_where(error_of: Callable[[Child], Exception | None]) -> None:
    """From now on, a run that is handed to this process fails if it has an error."""
    from cxr.studies.child import Child

    train = Child.train

    def fail(child: Child, say: Callable[[str], object]) -> None:
        if error := error_of(child):
            raise error
        train(child, say)

    Child.train = fail  # type: ignore[method-assign]


def die_in_first_epoch(variable: str) -> None:
    """From now on, a run kills this process after an epoch if the variable names a file that does not exist yet."""
    from cxr.studies.child import Child

    train = Child.train

    def die(child: Child, say: Callable[[str], object]) -> None:
        mark = Path(os.environ.get(variable, os.devnull))

        def heard(line: str) -> None:
            say(line)
            if line.startswith("epoch  0") and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        train(child, heard)

    Child.train = die  # type: ignore[method-assign]
