"""What the process loads from which those of `worker` are forked. To import it is to load it."""

from __future__ import annotations

import atexit
import gc
import os

from cxr.process import THRESHOLDS

gc.set_threshold(*THRESHOLDS)
atexit.register(os._exit, 0)  # of that process, whose children end otherwise

import mlflow.pyfunc  # noqa: E402
import mlflow.store.model_registry.sqlalchemy_store  # noqa: E402
import mlflow.store.tracking.sqlalchemy_store  # noqa: E402, F401

import cxr.figures.examples  # noqa: E402
import cxr.studies.child  # noqa: E402, F401
