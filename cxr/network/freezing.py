"""Freezing the stages that a phase does not train, and the proof that they did not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from cxr.network.ensemble import Ensemble
from cxr.network.stages import stage_modules, stage_parameters, stage_paths, stages_of
from cxr.network.weights import StateDict
from cxr.strategies import Phase


def apply_phase(model: nn.Module, phase: Phase) -> list[nn.Parameter]:
    """Freeze the prefix (no gradients; eval mode, so that BatchNorm's buffers stay) and make the suffix trainable.

    Returns the parameters to optimise.
    """
    model.eval()
    model.requires_grad_(False)
    for stage in phase.trainable:
        for module in stage_modules(model, stage):
            module.train()
        for parameter in stage_parameters(model, stage):
            parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stage_state(model: nn.Module, stages: Iterable[str]) -> StateDict:
    """The state dict's entries, buffers included, that belong to the stages."""
    paths = {path for stage in stages for path in stage_paths(model, stage)}
    inside = tuple(f"{path}." for path in paths)
    return {key: value for key, value in model.state_dict().items() if key in paths or key.startswith(inside)}


def checksum(model: nn.Module, stages: Iterable[str] | None = None) -> str:
    """The sha256 of names and bytes of every parameter and buffer of the stages (None: of all)."""
    sha = hashlib.sha256()
    for key, value in stage_state(model, stages_of(model) if stages is None else stages).items():
        sha.update(key.encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def bit_sums(model: nn.Module, stages: Iterable[str]) -> list[int]:
    """The sum of the bits, read as integers, of each tensor of the stages: what any step changes, in milliseconds.

    For a proof, `checksum`.
    """
    values = stage_state(model, stages).values()
    sums = [(v.view(torch.int32) if v.dtype == torch.float32 else v).sum(dtype=torch.int64) for v in values]
    found: list[int] = torch.stack(sums).tolist() if sums else []
    return found


def count_parameters(model: nn.Module, stages: Iterable[str] | None = None) -> int:
    """The number of parameters of the stages (None: of all), of all members of an ensemble."""
    if isinstance(model, Ensemble):
        return sum(count_parameters(member, stages) for member in model.networks)
    chosen = stages_of(model) if stages is None else stages
    return sum(parameter.numel() for stage in chosen for parameter in stage_parameters(model, stage))


@dataclass(frozen=True, slots=True)
class FreezeProof:
    """The sha256 over the prefix's parameters and buffers before and after a phase; equal, or the run failed."""

    phase: str
    stages: tuple[str, ...]
    before: str
    after: str
