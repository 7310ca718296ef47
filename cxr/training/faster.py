"""A phase's trainable suffix as a module, and ways to make its steps cheaper."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from cxr.data.batches import MAKING
from cxr.network.stages import run_stages


class Suffix(nn.Module):
    """The stages that a phase trains, as one module."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]):
        super().__init__()
        self.model, self.stages = model, stages

    def forward(self, features: Tensor) -> Tensor:
        """What enters the first of the stages -> logits [n, 2]."""
        return run_stages(self.model, features, self.stages)


class Fast(nn.Module):
    """A suffix made faster for batches of one shape, the first one's; others go through it as it is.

    `how` is `inductor` (torch.compile) or `graphs` (CUDA graphs of the forward and the backward pass).
    """

    def __init__(self, suffix: Suffix, how: str):
        super().__init__()
        self.suffix, self.how = suffix, how
        self.shape: torch.Size | None = None
        self._made: tuple[Callable[[Tensor], Tensor], ...] = ()  # in a tuple, as it is no part of this module

    def forward(self, features: Tensor) -> Tensor:
        """As the suffix's."""
        if self.shape is None:
            self.shape = features.shape
            self._made = (self._graphs(features) if self.how == "graphs" else self._inductor(),)
        return (self._made[0] if features.shape == self.shape else self.suffix)(features)

    def _inductor(self) -> Callable[[Tensor], Tensor]:
        # Its cache outlives this module: with torch's limit of 8, the ninth batch size of a search would go uncompiled.
        torch._dynamo.config.recompile_limit = 200
        return torch.compile(self.suffix, dynamic=False)

    def _graphs(self, features: Tensor) -> Callable[[Tensor], Tensor]:
        """Recorded under the caller's autocast, whose cache of cast weights a recording must not see.

        The warm-up passes of `make_graphed_callables` go through BatchNorm, too, and draw for dropout: its buffers and
        the generators are put back.
        """
        twin = Suffix(self.suffix.model, self.suffix.stages)  # the recording replaces its `forward`
        buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
        kind, enabled = features.device.type, torch.is_autocast_enabled(features.device.type)
        gc.collect()  # graphs of an earlier phase must not be freed in the middle of a recording
        # The recording's own stream is meant to differ from the one that replays it.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        devices = [features.device] if kind == "cuda" else []
        with (
            MAKING,
            torch.random.fork_rng(devices),
            torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=enabled, cache_enabled=False),
        ):
            made = torch.cuda.make_graphed_callables(twin, (features.clone(),))
        for name, buffer in twin.named_buffers():
            buffer.copy_(buffers[name])
        return cast(Callable[[Tensor], Tensor], made)
