"""Logits of a network in eval mode, mixed precision, and BatchNorm folded into convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cxr.data.views import Batch
from cxr.network.ensemble import Ensemble, combined
from cxr.network.stages import run_stages, stage_modules, stage_parts, stage_paths, stages_of
from cxr.network.start import StartNetwork


def folded(model: nn.Module, stages: Iterable[str]) -> nn.Module:
    """A copy for inference, each BatchNorm of the stages folded into the convolution before it.

    The same function up to rounding, in fewer passes over memory (`torch.nn.utils.fusion`).
    """
    copy = deepcopy(model).eval().requires_grad_(False)
    for stage in stages:
        for module in [inner for outer in stage_modules(copy, stage) for inner in outer.modules()]:
            _fold(module, list(module.named_children()))
        parts = zip(stage_paths(copy, stage), stage_parts(copy, stage), strict=True)
        _fold(copy, [(path, part) for path, part in parts if isinstance(part, nn.Module)])
    return copy


def _fold(root: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    """Among `modules` (path below `root`, module), in order: where torchvision has a convolution and then a BatchNorm
    in a row, they also run in a row. A BatchNorm before its convolution, as most in DenseNet, stays.
    """
    for (conv_path, conv), (norm_path, norm) in pairwise(modules):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            _replace(root, conv_path, fuse_conv_bn_eval(conv, norm))
            _replace(root, norm_path, nn.Identity())


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context for `fp32` (none), `bf16` or `fp16`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def infer_with_features(
    model: nn.Module, start: StartNetwork, batches: Iterable[Batch], precision: str = "fp32", shared: bool = False
) -> tuple[Tensor, Tensor]:
    """(features float32 [n, d], logits float32 [n, k]) on the CPU.

    The features are those of `start`, which shares its first stages with the network, or an ensemble's first member.
    With `shared`, the batches hold what these stages gave instead of images; not for ensembles.
    """
    networks = model.networks if isinstance(model, Ensemble) else [model]
    first, others = networks[0].eval(), networks[1:]
    features, logits = [], []
    with torch.inference_mode():
        for inputs, _ in batches:
            with autocast(inputs.device, precision):
                given = inputs if shared else run_stages(first, inputs, start.shared)
                features.append(start.features(given).cpu())
                answers = [run_stages(first, given, stages_of(first)[len(start.shared) :])]
                answers += [other.eval()(inputs) for other in others]
            logits.append((combined(torch.stack(answers).float()) if others else answers[0].float()).cpu())
    return torch.cat(features).clone(), torch.cat(logits).clone()


def infer(
    model: nn.Module, batches: Iterable[Batch], precision: str = "fp32", stages: Iterable[str] | None = None
) -> tuple[Tensor, Tensor]:
    """(logits float32 [n, k], labels int64 [n]) on the CPU, the model in eval mode.

    `stages` are the ones still to run on the batches' inputs; None, and an ensemble in any case, runs all of them.
    """
    model.eval()
    stages = None if isinstance(model, Ensemble) else stages
    logits, labels = [], []
    with torch.inference_mode():
        for inputs, batch_labels in batches:
            with autocast(inputs.device, precision):
                logits.append((model(inputs) if stages is None else run_stages(model, inputs, stages)).float())
            labels.append(batch_labels)
    # Clones, because inference tensors may not meet autograd later.
    return torch.cat(logits).cpu().clone(), torch.cat(labels).cpu()
