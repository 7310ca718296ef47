"""A minimal ResNet: tests of the training loop and of whole runs need its structure, not its size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock

from cxr import config
from cxr.parameters import Spec

ARCH = "narrow_resnet"
FEATURES = 64  # what enters the head; layer4 gets half as many channels


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


def narrow_resnet(seed: int = 0) -> ResNet:
    """A network of 100,000 parameters, in the memory format used in training."""
    torch.manual_seed(seed)
    return build(num_classes=2).to(memory_format=torch.channels_last)


def allow() -> None:
    """Let configurations of this process name the narrow network, beside those that users may choose."""
    check = config.check

    def allowed(name: str, value: Any, spec: Spec) -> None:
        if (name, value) != ("arch", ARCH):
            check(name, value, spec)

    config.check = allowed
