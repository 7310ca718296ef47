"""What the processes of a Ray cluster do before they train for tests: `prepare` is named in the runtime environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERROR = "CXR_TEST_ERROR"  # a variable of the driver: runs fail with this text
RUNTIME = {
    "worker_process_setup_hook": "ray_workers.prepare",
    "env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])},
}


def prepare() -> None:
    """Let runs use the narrow network, save no plots, and fail where a test wants it."""
    import pytest
    from narrow import allow
    from placeholder import leave_plots_out
    from unsynced import write_behind

    from cxr.errors import UserError
    from cxr.studies.child import Child

    train = Child.train

    def fail(child: Child, say: Callable[[str], object]) -> None:
        if reason := os.environ.get(ERROR):
            raise UserError(reason)
        train(child, say)

    Child.train = fail  # type: ignore[method-assign]
    allow()
    leave_plots_out(pytest.MonkeyPatch())
    write_behind()
