"""Freezing the stages that a phase does not train, and the proof that they did not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models import ResNet

from cxr.network.ensemble import Ensemble
from cxr.network.resnet import stage_modules
from cxr.network.weights import StateDict
from cxr.strategies import STAGES, Phase


def apply_phase(model: ResNet, phase: Phase) -> list[nn.Parameter]:
    """Freeze the prefix (no gradients; eval mode, so that BatchNorm's buffers stay) and make the suffix trainable.

    Returns the parameters to optimise.
    """
    model.eval()
    model.requires_grad_(False)
    for stage in phase.trainable:
        for module in stage_modules(model, stage):
            module.train().requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stage_state(model: ResNet, stages: Iterable[str]) -> StateDict:
    """The state dict's entries, buffers included, that belong to the stages."""
    prefixes = tuple(p for s in stages for p in (("conv1.", "bn1.") if s == "stem" else (f"{s}.",)))
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}


def checksum(model: ResNet, stages: Iterable[str] = STAGES) -> str:
    """The sha256 of names and bytes of every parameter and buffer of the stages."""
    sha = hashlib.sha256()
    for key, value in stage_state(model, stages).items():
        sha.update(key.encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def bit_sums(model: ResNet, stages: Iterable[str]) -> list[int]:
    """The sum of the bits, read as integers, of each tensor of the stages: what any step changes, in milliseconds.

    For a proof, `checksum`.
    """
    values = stage_state(model, stages).values()
    sums = [(v.view(torch.int32) if v.dtype == torch.float32 else v).sum(dtype=torch.int64) for v in values]
    found: list[int] = torch.stack(sums).tolist() if sums else []
    return found


def count_parameters(model: ResNet | Ensemble, stages: Iterable[str] = STAGES) -> int:
    """The number of parameters of the stages, of all members of an ensemble."""
    if isinstance(model, Ensemble):
        return sum(count_parameters(member, stages) for member in model.networks)
    return sum(p.numel() for s in stages for m in stage_modules(model, s) for p in m.parameters())


@dataclass(frozen=True, slots=True)
class FreezeProof:
    """The sha256 over the prefix's parameters and buffers before and after a phase; equal, or the run failed."""

    phase: str
    stages: tuple[str, ...]
    before: str
    after: str
