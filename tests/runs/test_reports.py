"""Evaluation from the kept outputs of the frozen stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import small
from torch import nn

from cxr.config import TrainConfig
from cxr.data.load import Data, read_data
from cxr.errors import MachineError
from cxr.network import stages
from cxr.network.resnet import build_model
from cxr.runs import reports
from cxr.runs.reports import Before, before_training, outputs_of


def prepared(
    phantoms: Path, cache: Path, strategy: str, reuse_gb: float
) -> tuple[TrainConfig, Data, nn.Module, Before]:
    """A network whose trained stages differ from the start."""
    config = small(TrainConfig, phantoms, strategy=strategy, cache_dir=str(cache), reuse_gb=reuse_gb)
    data = read_data(config)
    model, _ = build_model(config.arch, "random", 0)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = before_training(config, data, model, "fp32")
    with torch.no_grad():
        for value in stages.stage_modules(model, config.phases[-1].trainable[-1])[0].parameters():
            value += 0.05
    return config, data, model.eval(), before


@pytest.mark.parametrize("strategy", ["frozen", "partial", "full"])
def test_the_outputs_are_those_of_the_whole_network_bit_for_bit_and_kept(
    phantoms: Path, tmp_path: Path, strategy: str, seen: list[int]
) -> None:
    config, data, model, before = prepared(phantoms, tmp_path, strategy, 1.0)
    plain = outputs_of(replace(config, strategy="full"), data, model, before)
    seen.clear()
    for _ in range(2):
        found = outputs_of(config, data, model, before)
        for split in ("val", "test"):
            np.testing.assert_array_equal(found.logits(split), plain.logits(split))
            np.testing.assert_array_equal(found.percentiles(split), plain.percentiles(split))
    images = 0 if strategy == "full" else len(data.part("val")) + len(data.part("test"))
    assert sum(count for count in seen if count > 2) == images  # a pass of two images tells the shape of a row


def test_kept_outputs_that_are_not_those_of_the_network_are_refused(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data, model, before = prepared(phantoms, tmp_path, "partial", 1.0)
    batches = reports.evaluation_batches

    def damaged(*arguments: object) -> object:
        found, shared = batches(*arguments)  # type: ignore[arg-type]
        return ((features * 1.5, labels) for features, labels in found), shared

    monkeypatch.setattr(reports, "evaluation_batches", damaged)
    with pytest.raises(MachineError, match="remove this folder and resume"):
        outputs_of(config, data, model, before)
