"""What the processes of a Ray cluster do before they train for tests: `prepare` is named in the runtime environment."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERROR = "CXR_TEST_ERROR"  # a variable of the driver: runs fail with this text
DEATH = "CXR_TEST_DEATH"  # another: the first process to end an epoch makes this file and dies
RUNTIME = {
    "worker_process_setup_hook": "ray_workers.prepare",
    "env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])},
}


def prepare() -> None:
    """As other processes of tests, and runs fail or die where a test wants it."""
    from as_tests_run import die_in_first_epoch, fail_where, run_as_tests_do

    from cxr.errors import UserError

    die_in_first_epoch(DEATH)
    fail_where(lambda child: UserError(os.environ[ERROR]) if ERROR in os.environ else None)
    run_as_tests_do()
