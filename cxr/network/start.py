"""The network as it was before training, whose pooled features tell which images do not belong.

The trained network tells fewer of them (experiments/LOG.md, "familiarity, chosen on validation").
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr.network.freezing import stage_state
from cxr.network.stages import pool, run_stages, stages_of
from cxr.network.weights import StateDict
from cxr.strategies import Phase


class StartNetwork:
    """A network's stages as they were before training; those that no phase trained are `shared` with it as it is now.

    The others are `own`. The weights of their layers are kept in half precision, which is what a package holds.
    """

    def __init__(self, network: nn.Module, own: StateDict):
        self.network = deepcopy(network).eval().requires_grad_(False)
        self.network.load_state_dict(own, strict=False)
        body = stages_of(network)[:-1]
        changed = [stage for stage in body if stage_state(network, [stage]).keys() & own.keys()]
        self.shared = body[: body.index(changed[0])] if changed else body
        self.own = body[len(self.shared) :]

    @classmethod
    def of(cls, network: nn.Module, phases: Iterable[Phase]) -> StartNetwork:
        """From the network before training, and the phases that it will be trained in."""
        trained = {stage for phase in phases for stage in phase.trainable}
        body = stages_of(network)[:-1]
        return cls(network, _halved(stage_state(network, [stage for stage in body if stage in trained])))

    def state(self) -> StateDict:
        """What must be kept beside the trained network."""
        return _halved(stage_state(self.network, self.own))

    def features(self, shared: Tensor) -> Tensor:
        """What the shared stages gave [n, …] -> the pooled features [n, d], each of length 1."""
        pooled = pool(self.network, run_stages(self.network, shared, self.own))
        return F.normalize(torch.flatten(pooled, 1).float())


def _halved(state: StateDict) -> StateDict:
    """Weights of layers in half precision. What norms and scales hold stays, because it can leave that range."""
    weights = {name for name, value in state.items() if value.dim() in (2, 4) and value.is_floating_point()}
    return {name: (value.half() if name in weights else value.clone()) for name, value in state.items()}
