"""Logits of a network in eval mode, mixed precision, and BatchNorm folded into convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import ResNet

from cxr.data.views import Batch
from cxr.network.ensemble import Ensemble, combined
from cxr.network.resnet import run_stages
from cxr.network.start import StartNetwork
from cxr.strategies import STAGES


def folded(model: ResNet, stages: Iterable[str]) -> ResNet:
    """A copy for inference, each BatchNorm of the stages folded into the convolution before it.

    The same function up to rounding, in fewer passes over memory (`torch.nn.utils.fusion`).
    """
    copy = deepcopy(model).eval().requires_grad_(False)
    for stage in stages:
        for module in [copy] if stage == "stem" else getattr(copy, stage).modules():
            _fold(module)
    return copy


def _fold(module: nn.Module) -> None:
    """Among the module's own children; in torchvision's ResNets a BatchNorm follows its convolution."""
    for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context for `fp32` (none), `bf16` or `fp16`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def infer_with_features(
    model: ResNet | Ensemble, start: StartNetwork, batches: Iterable[Batch], precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """(features float32 [n, d], logits float32 [n, k]) on the CPU.

    The features are those of `start`, which shares its first stages with the network, or an ensemble's first member.
    """
    networks = model.networks if isinstance(model, Ensemble) else [model]
    first, others = networks[0].eval(), networks[1:]
    features, logits = [], []
    with torch.inference_mode():
        for inputs, _ in batches:
            with autocast(inputs.device, precision):
                shared = run_stages(first, inputs, start.shared)
                features.append(start.features(shared).cpu())
                answers = [run_stages(first, shared, STAGES[len(start.shared) :])]
                answers += [other.eval()(inputs) for other in others]
            logits.append((combined(torch.stack(answers).float()) if others else answers[0].float()).cpu())
    return torch.cat(features).clone(), torch.cat(logits).clone()


def infer(
    model: ResNet | Ensemble, batches: Iterable[Batch], precision: str = "fp32", stages: Iterable[str] = STAGES
) -> tuple[Tensor, Tensor]:
    """(logits float32 [n, k], labels int64 [n]) on the CPU, the model in eval mode.

    `stages` are the ones still to run on the batches' inputs; an ensemble runs all of them.
    """
    model.eval()
    logits, labels = [], []
    with torch.inference_mode():
        for inputs, batch_labels in batches:
            with autocast(inputs.device, precision):
                whole = isinstance(model, Ensemble)
                logits.append((model(inputs) if whole else run_stages(model, inputs, stages)).float())
            labels.append(batch_labels)
    # Clones, because inference tensors may not meet autograd later.
    return torch.cat(logits).cpu().clone(), torch.cat(labels).cpu()
