"""How a torchvision network is built, with a head of its own and initial weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from cxr.config import TrainConfig
from cxr.families import FAMILIES, VIT
from cxr.network.weights import InitialWeights, WeightsKind, fit_weights, load_imagenet, read_weights


def create(arch: str, classes: int = 2, size: int = 224) -> nn.Module:
    """The plain torchvision network, with random weights, for images of `size` x `size` pixels."""
    fixed = {"image_size": size} if FAMILIES[arch] is VIT else {}  # the others take images of any size
    model: nn.Module = models.get_model(arch, weights=None, num_classes=classes, **fixed)
    return model


def build_model(
    arch: str, weights: str, seed: int, classes: int = 2, size: int = 224
) -> tuple[nn.Module, InitialWeights]:
    """(model with a fresh head, which weights were really used), for `classes` and images of `size` x `size` pixels.

    `weights` is `auto`, `imagenet`, `random` or a file. Raises `UserError` if the weights are unavailable
    or do not fit.
    """
    torch.manual_seed(seed)
    model = create(arch, classes, size)
    if weights == "random":
        return model, InitialWeights(WeightsKind.RANDOM)
    if weights in ("auto", "imagenet"):
        return model, load_imagenet(model, arch, required=weights == "imagenet")
    path = Path(weights).expanduser().absolute()
    fit_weights(model, read_weights(path), str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return model, InitialWeights(WeightsKind.FILE, f"{path.name} (sha256 {digest})")


def ready_model(config: TrainConfig, classes: int, device: torch.device) -> tuple[nn.Module, InitialWeights]:
    """`build_model` as configured, on the device, in the memory format used in training."""
    model, weights = build_model(config.arch, config.weights, config.seed, classes, config.image_size)
    return model.to(device).to(memory_format=torch.channels_last), weights
