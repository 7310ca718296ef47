"""Shared fixtures: a tiny phantom data set, made once, and a cache of each test's own."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import pytest

from cxr.data.synthetic import write_synthetic

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's cache, nor logs into a run that happens to be open."""
    monkeypatch.setenv("CXR_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kaggle-shaped folder of 64-pixel phantoms: about 45 train, 16 val and 20 test images."""
    return write_synthetic(tmp_path_factory.mktemp("phantoms"), seed=1, train_patients=24, test_patients=10, size=64)
