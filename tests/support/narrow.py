"""Minimal networks of every family: tests of training and of whole runs need their structure, not their size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import ResNet
from torchvision.models._api import register_model
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import BasicBlock

from cxr import config
from cxr.families import CONVNEXT, DENSENET, EFFICIENTNET, FAMILIES, RESNET, SWIN, VIT, Family
from cxr.parameters import Spec

ARCH = "narrow_resnet"
FEATURES = 64  # what enters the head; layer4 gets half as many channels
OTHERS = (
    "narrow_densenet",
    "narrow_efficientnet",
    "narrow_efficientnet_v2",
    "narrow_convnext",
    "narrow_vit",
    "narrow_swin",
)


class _Narrow(ResNet):
    """One block per stage, an eighth of the channels."""

    def _make_layer(self, block: type[BasicBlock], planes: int, *args: Any, **options: Any) -> nn.Sequential:
        layer: nn.Sequential = super()._make_layer(block, planes // 8, *args, **options)
        return layer


@register_model(ARCH)  # type: ignore[untyped-decorator]
def build(*, weights: None = None, num_classes: int = 1000) -> ResNet:
    """As torchvision's own builders: `--arch narrow_resnet` finds it, and so does a packaged model."""
    model = _Narrow(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
    model.fc = nn.Linear(FEATURES, num_classes)
    return model


def _densenet(num_classes: int) -> nn.Module:
    return models.DenseNet(8, (1, 2, 1, 1), 16, bn_size=2, num_classes=num_classes)


def _efficientnet(num_classes: int, kinds: str = "mmmmmmm") -> nn.Module:
    """A stage for each of `kinds`: m is MBConv, f is its fused form."""
    settings = [(FusedMBConvConfig if kind == "f" else MBConvConfig)(2, 3, 1, 8, 8, 2) for kind in kinds]
    return models.EfficientNet(settings, dropout=0.2, stochastic_depth_prob=0.5, num_classes=num_classes)


def _convnext(num_classes: int) -> nn.Module:
    blocks = [CNBlockConfig(8 * n, 8 * n + 8 if n < 4 else None, 1 + n // 4) for n in (1, 2, 3, 4)]
    return models.ConvNeXt(blocks, stochastic_depth_prob=0.5, layer_scale=0.1, num_classes=num_classes)


def _vit(num_classes: int, image_size: int = 64) -> nn.Module:
    return models.VisionTransformer(image_size, 16, 12, 2, 8, 16, dropout=0.1, num_classes=num_classes)


def _swin(num_classes: int) -> nn.Module:
    sizes: dict[str, Any] = {"depths": [1, 1, 1, 2], "num_heads": [1, 1, 2, 2], "window_size": [7, 7]}
    return models.SwinTransformer([4, 4], 8, **sizes, stochastic_depth_prob=0.5, num_classes=num_classes)


def _register(arch: str, make: Callable[..., nn.Module], family: Family) -> None:
    def build(*, weights: None = None, num_classes: int = 1000, **options: Any) -> nn.Module:
        return make(num_classes, **options)

    register_model(arch)(build)
    FAMILIES[arch] = family


FAMILIES[ARCH] = RESNET
_register("narrow_densenet", _densenet, DENSENET)
_register("narrow_efficientnet", _efficientnet, EFFICIENTNET)
_register("narrow_efficientnet_v2", partial(_efficientnet, kinds="fffmmm"), EFFICIENTNET)
_register("narrow_convnext", _convnext, CONVNEXT)
_register("narrow_vit", _vit, VIT)
_register("narrow_swin", _swin, SWIN)


def narrow_resnet(seed: int = 0) -> ResNet:
    """A network of 100,000 parameters, in the memory format used in training."""
    torch.manual_seed(seed)
    return build(num_classes=2).to(memory_format=torch.channels_last)


def allow() -> None:
    """Let configurations of this process name the narrow networks, beside those that users may choose."""
    check = config.check

    def allowed(name: str, value: Any, spec: Spec) -> None:
        if name != "arch" or value not in (ARCH, *OTHERS):
            check(name, value, spec)

    config.check = allowed
