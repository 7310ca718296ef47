"""A whole run of every family, from training to the registry and out of it again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from narrow import OTHERS
from small import quiet, small

from cxr.config import TrainConfig
from cxr.errors import UserError
from cxr.network.resnet import create
from cxr.runs.train import run_tracked
from cxr.serving.predictor import ModelCard, Predictor
from cxr.task import KAGGLE
from cxr.tracking.reading import LoggedRun
from cxr.tracking.registry import load


@pytest.mark.slow
@pytest.mark.parametrize("arch", OTHERS)
def test_a_run_is_registered_and_its_model_predicts_as_it_did(
    arch: str, in_store: str, phantoms: Path, tmp_path: Path
) -> None:
    options = {"arch": arch, "strategy": "partial", "register": arch.replace("_", "-")}
    result = run_tracked(small(TrainConfig, phantoms, **options), quiet)
    run = LoggedRun.open(result.run_id)
    assert "unchanged" in run.tags["freezing"]
    predictor = load(f"models:/{options['register']}@champion")
    files = [phantoms / path for path in result.test.table["path"][:3]]
    found = predictor.predict_files(files)
    np.testing.assert_allclose(found["probability"], result.test.table["probability"][:3], atol=1e-5)
    assert found["familiarity"].between(0, 100).all()
    model = create(arch, size=64)
    model.load_state_dict(torch.load(predictor.export(tmp_path)[0], weights_only=True))
    assert type(predictor.networks[0]) is type(model)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["narrow_densenet", "narrow_convnext", "narrow_swin"])
def test_onnx_gives_the_same_probabilities(arch: str, tmp_path: Path) -> None:
    import onnxruntime

    card = ModelCard(arch, 64, "pad", 0.5, "full", "0123456789ab", "random", KAGGLE.class_to_index)
    predictor = Predictor(create(arch, size=64), card)
    session = onnxruntime.InferenceSession(predictor.export(tmp_path, onnx=True)[-1])
    images = np.random.default_rng(2).integers(0, 256, (3, 64, 64), np.uint8)
    for part in (images, images[:1]):
        (answers,) = session.run(None, {"image": part})
        np.testing.assert_allclose(answers, predictor.predict(list(part))["probability"], rtol=1e-4)


def test_a_network_that_cannot_be_exported_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise torch.onnx.OnnxExporterError("an operator is missing\nand a long story")

    monkeypatch.setattr(torch.onnx, "export", fails)
    card = ModelCard("narrow_vit", 64, "pad", 0.5, "full", "0123456789ab", "random", KAGGLE.class_to_index)
    with pytest.raises(UserError, match=r"cannot export narrow_vit \(an operator is missing\); leave --onnx out"):
        Predictor(create("narrow_vit", size=64), card).export(tmp_path, onnx=True)
