"""A minimal ResNet: tests of the training loop need its structure, not its size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

FEATURES = 64  # what enters the head; layer4 gets half as many channels


class _Narrow(ResNet):
    """One block per stage, an eighth of the channels."""

    def _make_layer(self, block: type[BasicBlock], planes: int, *args: Any, **options: Any) -> nn.Sequential:
        layer: nn.Sequential = super()._make_layer(block, planes // 8, *args, **options)
        return layer


def narrow_resnet(seed: int = 0) -> ResNet:
    """A network of 100,000 parameters, in the memory format used in training."""
    torch.manual_seed(seed)
    model = _Narrow(BasicBlock, [1, 1, 1, 1], num_classes=2)
    model.fc = nn.Linear(FEATURES, 2)
    return model.to(memory_format=torch.channels_last)
