"""The mean of a network's weights over training steps."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from cxr.network.freezing import stage_state


class WeightAverage:
    """The simple mean, over the steps counted so far, of the parameters and BatchNorm statistics of some stages.

    `model` is a copy of the network that holds the mean; its other stages stay as they were, bit for bit. After Arpit
    et al. 2022, "Ensemble of Averages", computed by `torch.optim.swa_utils`.
    """

    def __init__(self, model: nn.Module, stages: tuple[str, ...]):
        self.model, self.stages, self.steps = deepcopy(model).requires_grad_(False).eval(), stages, 0
        mean, current = stage_state(self.model, stages), stage_state(model, stages)
        self._mean = [value for value in mean.values() if value.is_floating_point()]
        self._current = [current[name] for name, value in mean.items() if value.is_floating_point()]
        self._update = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Count the weights of the network as they are now."""
        self._update(self._mean, self._current, self.steps)
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """The mean and the number of steps, for a checkpoint."""
        return {"steps": self.steps, "tensors": stage_state(self.model, self.stages)}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.steps = state["steps"]
        with torch.no_grad():
            self.model.load_state_dict(state["tensors"], strict=False)
