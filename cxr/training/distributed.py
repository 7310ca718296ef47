"""Data-parallel training of one model by several processes (DistributedDataParallel), started by torchrun.

Each takes its share of every batch; gradients, BatchNorm's statistics and the epoch's sums are those of the whole
batch, so the numbers are those of one process up to rounding (an epoch's last batch is skipped if it has fewer images
than processes). Only the first process (rank 0) logs and writes. In a single process, nothing here has an effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cxr.machine import processes, resolve_device

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # while the first process decodes and audits, the others wait


@contextmanager
def joined(device_name: str) -> Iterator[None]:
    """Within the block, this process is a member of the group that torchrun started, if it started one.

    An error leaves the group open: leaving it in order would wait for the others.
    """
    if processes() == 1:
        yield
        return
    device = resolve_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()


def size() -> int:
    """The number of processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: T) -> T:
    """The first process's value, in all of them."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def summed(values: Tensor) -> Tensor:
    """The sum over the processes."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def broadcast(values: Tensor) -> Tensor:
    """The first process's values, in all of them; they must have one shape."""
    if size() > 1:
        values = values.contiguous()
        dist.broadcast(values, 0)
    return values


def wait() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier()


def shares(order: list[Tensor]) -> list[Tensor]:
    """This process's part of each batch of an epoch; a last batch with fewer images than processes is skipped."""
    if size() == 1:
        return order
    return [torch.tensor_split(batch, size())[rank()] for batch in order if len(batch) >= size()]


def data_parallel(module: nn.Module) -> nn.Module:
    """The module, its gradients averaged over the processes."""
    if size() == 1:
        return module
    # `share_batchnorm` keeps the buffers equal; torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(module, **{option: False})  # type: ignore[arg-type]


def share_batchnorm(model: nn.Module, modules: Iterable[nn.Module], device: torch.device) -> None:
    """Let every BatchNorm of the model that is one of the modules, or inside one, count over the whole batch, in all
    processes: in place."""
    if size() == 1:
        return
    inside = {id(inner) for module in modules for inner in module.modules()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d and id(child) in inside:
                setattr(parent, name, _shared(child, device))


def _shared(norm: nn.BatchNorm2d, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        shared: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
        return shared
    return SharedBatchNorm.like(norm)


class _Sum(torch.autograd.Function):
    """The sum over the processes; each one's loss depends on all of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return summed(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return summed(gradients[0].clone())


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose mean and variance are those of all processes' images; torch's own requires GPUs."""

    @classmethod
    def like(cls, norm: nn.BatchNorm2d) -> SharedBatchNorm:
        """One with the parameters and buffers of another, shared with it."""
        shared = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        shared.weight, shared.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(shared, name, buffer)
        return shared.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c, h, w]."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = _Sum.apply(torch.cat([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3)), count]))
        total, channels = sums[-1], x.shape[1]
        mean = sums[:channels] / total
        variance = sums[channels:-1] / total - mean * mean
        self._note(mean.detach(), variance.detach() * total.detach() / (total.detach() - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        normed: Tensor = x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return normed.to(input.dtype)

    def _note(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
