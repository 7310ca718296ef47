"""Grad-CAM heat maps."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from cxr.data.decode import UInt8
from cxr.data.views import to_input
from cxr.network.ensemble import Ensemble
from cxr.network.stages import family_of, join_maps, run_stages, split_maps

Float32 = npt.NDArray[np.float32]
POSITIVE = 1  # the label of the positive class
_BATCH = 32


def heatmaps(model: nn.Module, images: UInt8 | Sequence[UInt8], target: int | Sequence[int] = POSITIVE) -> Float32:
    """Prepared images [n, s, s] -> float32 [n, s, s] in 0 to 1: what spoke for a class, and where.

    `target` is the label of the class, of all images or of each.

    Grad-CAM (Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks, 2017) of the class's logit on the last
    stage with maps (`Family.cam`; layer4 of a ResNet), enlarged bilinearly, each map in parts of its own maximum; one
    without any support is 0 throughout. The model is evaluated in eval mode whatever its state, on its own device, and
    is left as it was. That of an ensemble is the mean over its members.
    """
    if isinstance(model, Ensemble):
        mean: Float32 = np.mean([heatmaps(member, images, target) for member in model.networks], axis=0)
        return mean
    # A copy: modes, flags and gradients of the caller's model stay whatever happens here, and captum hooks into this.
    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    targets = torch.tensor(target).expand(len(images))
    parts = zip(torch.split(torch.from_numpy(np.array(images)), _BATCH), torch.split(targets, _BATCH), strict=True)
    heats: Float32 = torch.cat([_heat(model, part.to(device), own.to(device)).cpu() for part, own in parts]).numpy()
    return heats


def _heat(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    family = family_of(model)
    after = family.stages.index(family.cam) + 1
    with torch.no_grad():  # up to the maps no gradient is asked for, and a graph would fill gigabytes
        maps, rest = split_maps(model, run_stages(model, to_input(images), family.stages[:after]))

    def logits(maps: Tensor) -> Tensor:
        return run_stages(model, join_maps(model, seam(maps), rest), family.stages[after:])

    seam = nn.Identity()  # where captum takes the maps and their gradients
    cam = LayerGradCam(logits, seam)
    weighted = cam.attribute(maps.requires_grad_(), target=target, relu_attributions=True).detach()
    heat = F.interpolate(weighted, size=images.shape[1:], mode="bilinear", align_corners=False).squeeze(1)
    highest = heat.amax((1, 2), keepdim=True)
    return torch.where(highest > 0, heat / highest, 0.0)
