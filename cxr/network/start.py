"""The network as it was before training, whose pooled features tell which images do not belong.

The trained network tells fewer of them (experiments/LOG.md, "familiarity, chosen on validation").
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import ResNet

from cxr.network.freezing import stage_state
from cxr.network.resnet import run_stages
from cxr.network.weights import StateDict
from cxr.strategies import STAGES, Phase

BODY = STAGES[:-1]


class StartNetwork:
    """A network's stages as they were before training; those that no phase trained are `shared` with it as it is now.

    The others are `own`. Their convolutions are kept in half precision, which is what a package holds.
    """

    def __init__(self, network: ResNet, own: StateDict):
        self.network = deepcopy(network).eval().requires_grad_(False)
        self.network.load_state_dict(own, strict=False)
        changed = [stage for stage in BODY if stage_state(network, [stage]).keys() & own.keys()]
        self.shared = BODY[: BODY.index(changed[0])] if changed else BODY
        self.own = BODY[len(self.shared) :]

    @classmethod
    def of(cls, network: ResNet, phases: Iterable[Phase]) -> StartNetwork:
        """From the network before training, and the phases that it will be trained in."""
        trained = {stage for phase in phases for stage in phase.trainable}
        return cls(network, _halved(stage_state(network, [stage for stage in BODY if stage in trained])))

    def state(self) -> StateDict:
        """What must be kept beside the trained network."""
        return _halved(stage_state(self.network, self.own))

    def features(self, shared: Tensor) -> Tensor:
        """What the shared stages gave [n, …] -> the pooled features [n, d], each of length 1."""
        pooled = self.network.avgpool(run_stages(self.network, shared, self.own))
        return F.normalize(torch.flatten(pooled, 1).float())


def _halved(state: StateDict) -> StateDict:
    """Convolutions in half precision. BatchNorm stays as it is, because its variances can leave that range."""
    return {name: (value.half() if value.dim() == 4 else value.clone()) for name, value in state.items()}
