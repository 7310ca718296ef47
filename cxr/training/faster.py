"""A training step, and ways to make it cheaper."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr.data.batches import MAKING
from cxr.network.inference import autocast
from cxr.network.stages import run_stages
from cxr.training import distributed as parallel

WARM_UP = 3  # steps before one is recorded: libraries that are loaded, and memory that is taken, at first use


class Suffix(nn.Module):
    """The stages that a phase trains, as one module."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]):
        super().__init__()
        self.model, self.stages = model, stages

    def forward(self, features: Tensor) -> Tensor:
        """What enters the first of the stages -> logits [n, k]."""
        return run_stages(self.model, features, self.stages)


class Compiled(nn.Module):
    """A suffix by torch.compile, for batches of one shape, the first one's; others go through it as it is."""

    def __init__(self, suffix: Suffix):
        super().__init__()
        self.suffix = suffix
        self.shape: torch.Size | None = None
        # Its cache outlives this module: with torch's limit of 8, the ninth batch size of a search would go uncompiled.
        torch._dynamo.config.recompile_limit = 200
        self._made = (torch.compile(suffix, dynamic=False),)  # in a tuple, as it is no part of this module

    def forward(self, features: Tensor) -> Tensor:
        """As the suffix's."""
        if self.shape is None:
            self.shape = features.shape
        return cast(Tensor, (self._made[0] if features.shape == self.shape else self.suffix)(features))


class Step:
    """One training step: forward, loss, backward, optimizer.

    `sums` [3], on the device: of the weighted losses, the class weights and the correct predictions since `clear`.
    """

    def __init__(
        self,
        suffix: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        class_weights: Tensor,
        precision: str,
    ):
        self.suffix, self.optimizer, self.scaler = suffix, optimizer, scaler
        self.class_weights, self.precision = class_weights, precision
        self.sums = torch.zeros(3, device=class_weights.device)

    def clear(self) -> None:
        """Begin the sums anew."""
        self.sums.zero_()

    def __call__(self, features: Tensor, labels: Tensor) -> None:
        """Train on what enters the suffix and labels [n]."""
        with autocast(features.device, self.precision):
            logits = self.suffix(features).float()
        losses = F.cross_entropy(logits, labels, self.class_weights, reduction="none")
        weight = self.class_weights[labels].sum()
        share = parallel.summed(weight.clone()) / parallel.size()  # gradients are averaged over the processes
        self.optimizer.zero_grad()
        self.scaler.scale(losses.sum() / share).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        right = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([losses.detach().sum(), weight, right])


class RecordedStep:
    """A step as one CUDA graph, which a GPU runs without waiting for Python: the same kernels, so the same bits.

    For batches of one shape, the first one's; others, and the first few, take the step as it is. The graph holds the
    learning rates, so it is recorded again when they change.
    """

    def __init__(self, step: Step):
        self.step = step
        self.shape: torch.Size | None = None
        self._taken, self._rates = 0, list[float]()
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, features: Tensor, labels: Tensor) -> None:
        """As the step's."""
        if self.shape is None:
            self.shape = features.shape
        if features.shape != self.shape or self._taken < WARM_UP:
            self._taken += features.shape == self.shape
            self.step(features, labels)
        else:
            self._run(features, labels)

    def _run(self, features: Tensor, labels: Tensor) -> None:
        if self._inputs is None:
            self._inputs = features.clone(), labels.clone()
        else:
            self._inputs[0].copy_(features)
            self._inputs[1].copy_(labels)
        rates = [group["lr"] for group in self.step.optimizer.param_groups]
        if self._replay is None or rates != self._rates:
            self._replay = None  # its memory is needed for the new one
            self._replay, self._rates = record(self.step, self._inputs), rates
        self._replay()


def record(step: Step, inputs: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """What runs a step on the GPU with what is in `inputs` by then. Recording runs nothing itself."""
    gc.collect()  # graphs of an earlier phase must not be freed in the middle of a recording
    # The recording's own stream is meant to differ from the one that replays it.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    graph = torch.cuda.CUDAGraph()
    # `thread_local`: other threads (they write checkpoints and deliver to the store) do not spoil the recording.
    recording = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with MAKING, torch.random.fork_rng([inputs[0].device]), _capturable(step.optimizer), recording:
        step(*inputs)
    return graph.replay


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the optimizer be recorded; only for as long, as it would warn of steps that are not.

    torch asks for the mark because most optimizers count their steps on the CPU; the fused one counts on the GPU.
    """
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False
