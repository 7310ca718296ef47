"""A torchvision ResNet with two classes: how it is built, and its stages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import ResNet

from cxr.network.weights import InitialWeights, WeightsKind, fit_weights, load_imagenet, read_weights


def build_model(arch: str, weights: str, seed: int, classes: int = 2) -> tuple[ResNet, InitialWeights]:
    """(model with a fresh head for so many classes, which weights were really used).

    `weights` is `auto`, `imagenet`, `random` or a file. Raises `UserError` if the weights are unavailable
    or do not fit.
    """
    torch.manual_seed(seed)
    model: ResNet = models.get_model(arch, weights=None, num_classes=classes)
    if weights == "random":
        return model, InitialWeights(WeightsKind.RANDOM)
    if weights in ("auto", "imagenet"):
        return model, load_imagenet(model, arch, required=weights == "imagenet")
    path = Path(weights).expanduser().absolute()
    fit_weights(model, read_weights(path), str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return model, InitialWeights(WeightsKind.FILE, f"{path.name} (sha256 {digest})")


def stage_modules(model: ResNet, stage: str) -> tuple[nn.Module, ...]:
    """The modules with parameters or buffers that make a stage."""
    if stage == "stem":
        return model.conv1, model.bn1
    module: nn.Module = getattr(model, stage)
    return (module,)


def run_stages(model: ResNet, x: Tensor, stages: Iterable[str]) -> Tensor:
    """Part of the network: `x` is what the stage before the first of `stages` gave (or the input)."""
    for stage in stages:
        if stage == "stem":
            x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        elif stage == "fc":
            x = model.fc(torch.flatten(model.avgpool(x), 1))
        else:
            x = getattr(model, stage)(x)
    return x
