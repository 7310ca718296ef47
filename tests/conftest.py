"""Shared fixtures: a tiny phantom data set, created once, and a separate cache for each test."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from narrow import allow, narrow_resnet
from placeholder import leave_plots_out
from planted import planted
from small import small
from torch import Tensor
from torchvision.models import ResNet
from unsynced import write_behind

from cxr.data.batches import Split, make_split
from cxr.data.kaggle import index_folder
from cxr.data.phantoms import write_synthetic
from cxr.data.splits import assign_splits
from cxr.data.store import open_store
from cxr.data.views import to_input
from cxr.storage import Cache
from cxr.training import frozen_prefix as prefix

if TYPE_CHECKING:  # MLflow takes seconds to import, and most tests need none
    from mlflow.entities import Run

    from cxr.config import TrainConfig
    from cxr.runs.result import RunResult

matplotlib.use("Agg")
# pytest-xdist runs one process for each core; threads of their own would only wait for each other.
torch.set_num_threads(1)
# A test is not wrong for being slow on a machine that is busy.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
allow()
write_behind()
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # for joblib: the runs of a comparison one after the other, in this process


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tests neither use the cache of the user nor log to an active run."""
    monkeypatch.setenv("CXR_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def plots_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of single tests draw no plots; the run that tests share, `finished`, does."""
    leave_plots_out(monkeypatch)


@pytest.fixture
def studies_save(plots_left_out: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this test the figures of studies are saved."""
    leave_plots_out(monkeypatch, studies_too=False)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Kaggle layout with 64-pixel phantoms: about 45 train, 16 val and 20 test images."""
    return write_synthetic(tmp_path_factory.mktemp("phantoms"), seed=1, train_patients=24, test_patients=10, size=64)


@pytest.fixture(scope="session")
def splits(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Split]:
    """(train, val) of the phantoms at 32 pixels; neither is a multiple of a batch of 8."""
    table = assign_splits(index_folder(phantoms), "grouped", 0.25, seed=0)
    files = [phantoms / path for path in table["path"]]
    store = open_store(files, list(table["digest"]), 32, "squash", Cache(tmp_path_factory.mktemp("store")))
    train, val = make_split(table, store, "train"), make_split(table, store, "val")
    assert len(train) % 8 > 1
    assert len(val) % 8 > 1
    return train, val


@pytest.fixture
def tiny() -> ResNet:
    """A network of six stages that trains in a moment."""
    return narrow_resnet()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each forward pass of the frozen prefix."""
    counts: list[int] = []
    run_stages = prefix.run_stages

    def counted(model: ResNet, x: Tensor, stages: Iterable[str]) -> Tensor:
        counts.append(len(x))
        return run_stages(model, x, stages)

    monkeypatch.setattr(prefix, "run_stages", counted)
    return counts


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking store shared by tests, because creating one takes seconds."""
    import mlflow

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("cxr", artifact_location=str(folder / "artifacts"))
    yield uri
    mlflow.set_tracking_uri(None)


@pytest.fixture
def in_store(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Commands of this test use the shared store."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    return store


@pytest.fixture(scope="session")
def finished(
    store: str, phantoms: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, RunResult, Run]:
    """A tracked run of the real ResNet-18 with all its plots, and its record in the store."""
    import mlflow

    from cxr.config import TrainConfig
    from cxr.runs.train import run_tracked

    cache = str(tmp_path_factory.mktemp("cache"))
    options = {"arch": "resnet18", "strategy": "gradual", "val_split": "official", "bootstrap": 50}
    config = small(TrainConfig, phantoms, **options, cache_dir=cache)
    mlflow.set_tracking_uri(store)
    result = run_tracked(config, say=lambda line: None)
    return config, result, mlflow.get_run(result.run_id)


@pytest.fixture(scope="module")
def finder() -> ResNet:
    """A network trained to detect images with a square."""
    model = narrow_resnet(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(30):
        images, labels, _ = planted(step, 16)
        optimizer.zero_grad()
        F.cross_entropy(model(to_input(torch.from_numpy(images))), torch.from_numpy(labels)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval().requires_grad_(False)
