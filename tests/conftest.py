"""Shared fixtures: a tiny phantom data set, made once, and a cache of each test's own."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import pytest
import torch
from narrow import narrow_resnet
from torchvision.models import ResNet

from cxr.data.dataset import Split, make_split
from cxr.data.index import assign_splits, index_folder
from cxr.data.store import open_store
from cxr.data.synthetic import write_synthetic

matplotlib.use("Agg")
# pytest-xdist runs one process for each core; threads of their own would only wait for each other.
torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def splits(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Split]:
    """(train, val) of the phantoms at 32 pixels; neither is a multiple of a batch of 8."""
    table = assign_splits(index_folder(phantoms), "grouped", 0.25, seed=0)
    files = [phantoms / path for path in table["path"]]
    store = open_store(files, list(table["digest"]), 32, "squash", tmp_path_factory.mktemp("store"))
    train, val = make_split(table, store, "train"), make_split(table, store, "val")
    assert len(train) % 8 > 1
    assert len(val) % 8 > 1
    return train, val


@pytest.fixture
def tiny() -> ResNet:
    """A network of six stages that trains in no time."""
    return narrow_resnet()
