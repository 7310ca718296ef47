"""Whole runs on tiny phantoms."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import small

from cxr.config import TrainConfig, flatten
from cxr.data.load import read_data
from cxr.errors import FreezeError, UserError
from cxr.runs.messages import summary
from cxr.runs.resume import can_continue
from cxr.runs.train import run
from cxr.strategies import STRATEGIES
from cxr.tracking.reading import LoggedRun
from cxr.tracking.tracker import NullTracker


@pytest.fixture
def tiny(phantoms: Path) -> TrainConfig:
    """A run that takes seconds: 64 pixels, two epochs, no download."""
    return small(TrainConfig, phantoms, epochs=2, val_split="official", bootstrap=50)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_runs_and_logs_everything(tiny: TrainConfig, strategy: str) -> None:
    tracker = NullTracker()
    config = replace(tiny, strategy=strategy)
    result = run(config, tracker, say=lambda line: None)
    phases = len(STRATEGIES[strategy])
    epochs = [(step, logged) for step, logged in tracker.logged_metrics if "train_loss" in logged]
    assert [step for step, _ in epochs] == list(range(2 * phases))
    wanted = {"train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_roc_auc", "lr", "phase"}
    assert all(wanted <= logged.keys() for _, logged in epochs)
    step, final = tracker.logged_metrics[-1]
    assert step == len(epochs)
    assert {"test_roc_auc", "test_roc_auc_low", "test_roc_auc_high", "val_ece", "test_recall_bacteria"} <= final.keys()
    assert [proof.phase for proof in result.proofs] == [phase.name for phase in STRATEGIES[strategy]]
    assert "plots/test_reliability.png" in tracker.artifacts
    assert any("test, threshold 0.5" in line for line in summary(config, result))


def test_few_figures_are_those_that_one_looks_at_first(tiny: TrainConfig) -> None:
    tracker = NullTracker()
    run(replace(tiny, strategy="frozen", epochs=1, figures="few"), tracker, say=lambda line: None)
    found = {Path(name).stem for name in tracker.artifacts if name.startswith("plots/")}
    assert found == {"learning_curves", "test_gradcam", "test_confusion_matrix", "test_roc"}
    assert {"tables/val_predictions.csv", "reports/val.txt"} <= set(tracker.artifacts)


def test_the_same_seed_gives_the_same_result(tiny: TrainConfig) -> None:
    first, second, other = (
        run(config, NullTracker(), say=lambda line: None) for config in (tiny, tiny, replace(tiny, seed=1))
    )
    assert np.array_equal(first.test.probabilities, second.test.probabilities)
    assert not np.array_equal(first.test.probabilities, other.test.probabilities)


def test_the_cache_does_not_change_the_result(tiny: TrainConfig, own_cache: Path) -> None:
    first = run(tiny, NullTracker(), say=lambda line: None)
    assert list(own_cache.glob("store/64-squash/*/images.u8"))
    shutil.rmtree(own_cache)
    assert np.array_equal(first.test.probabilities, run(tiny, NullTracker(), say=lambda line: None).test.probabilities)


def test_a_run_whose_freezing_is_broken_fails(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from cxr.training import loop as train

    apply_phase = train.apply_phase

    def thaw_batchnorm(model: train.ResNet, phase: train.Phase) -> list[train.torch.nn.Parameter]:
        parameters = apply_phase(model, phase)
        model.bn1.train()  # and, unlike our own loop, send images through the whole model
        with train.torch.no_grad():
            model(train.torch.ones(2, 3, 64, 64))
        return parameters

    monkeypatch.setattr(train, "apply_phase", thaw_batchnorm)
    with pytest.raises(FreezeError, match="stem"):
        run(replace(tiny, reuse_gb=0), NullTracker(), say=lambda line: None)


def test_the_best_epoch_is_the_one_evaluated(tiny: TrainConfig) -> None:
    result = run(replace(tiny, strategy="full", epochs=3), NullTracker(), say=lambda line: None)
    assert result.best.metrics["val_loss"] == result.history["val_loss"].min()
    assert result.val.values["accuracy"] == pytest.approx(result.best.metrics["val_accuracy"])


def test_bad_images_stop_the_run_or_are_skipped_and_counted(tiny: TrainConfig, phantoms: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(phantoms, copy)
    victims = sorted((copy / "train" / "PNEUMONIA").iterdir())[:2]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:200])
    config = replace(tiny, data_dir=str(copy))
    with pytest.raises(UserError) as error:
        read_data(config)
    assert all(victim.name in str(error.value) for victim in victims)
    tracker = NullTracker()
    result = run(replace(config, on_bad_image="skip", epochs=1), tracker, say=lambda line: None)
    assert tracker.logged_tags["images_skipped"] == "2"
    assert any("2 unreadable images SKIPPED" in line for line in summary(config, result))


def test_random_weights_are_reported_in_tag_and_summary(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    tracker = NullTracker()
    with pytest.warns(UserWarning, match="RANDOM"):
        result = run(replace(tiny, arch="resnet18", weights="auto", epochs=1), tracker, say=lambda line: None)
    assert "could not be downloaded" in tracker.logged_tags["weights_used"]
    assert any("could not be downloaded" in line for line in summary(tiny, result))


def test_a_run_from_before_a_neutral_parameter_existed_can_be_continued(tiny: TrainConfig) -> None:
    config = replace(tiny, augment="mild-1", stresses="stresses-1")
    younger = {"train.augment", "train.average", "train.stresses", "train.abstain"}
    recorded = {key: value for key, value in flatten(config).items() if key not in younger}
    old = LoggedRun("0" * 32, "1", "old", "KILLED", recorded, {}, {}, "")
    assert can_continue(old, config)
    assert not can_continue(old, replace(config, augment="crops-2"))
    assert can_continue(old, replace(config, threads=7))  # it keeps its own
