"""Grad-CAM heat maps."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from narrow import narrow_resnet
from planted import SIDE, Bools, planted
from torchvision.models import ResNet

from cxr.data.decode import UInt8
from cxr.data.views import to_input
from cxr.figures.style import Floats
from cxr.network import gradcam
from cxr.network.freezing import checksum
from cxr.network.stages import run_stages, stage_modules
from cxr.strategies import STAGES


@pytest.fixture(scope="module")
def squares() -> tuple[UInt8, Bools]:
    """(held-out images with a square, mask of the square)."""
    images, labels, inside = planted(999, 40)
    return images[labels == 1], inside[labels == 1]


def correlation(a: Floats, b: Floats) -> float:
    """The mean correlation of pairs of maps; 0 for a constant map."""
    pairs = [(x.ravel(), y.ravel()) for x, y in zip(a, b, strict=True)]
    return float(np.mean([np.corrcoef(x, y)[0, 1] if x.std() > 0 and y.std() > 0 else 0.0 for x, y in pairs]))


def test_a_map_has_the_images_size_and_its_own_maximum_is_one(finder: ResNet, squares: tuple[UInt8, Bools]) -> None:
    heats = gradcam.heatmaps(finder, squares[0])
    assert heats.shape == (20, SIDE, SIDE)
    assert heats.dtype == np.float32
    assert heats.min() >= 0
    np.testing.assert_allclose(heats.max((1, 2)), 1, rtol=1e-6)


@pytest.mark.parametrize("target", [0, 1])
def test_before_a_pooled_head_grad_cam_equals_cam(finder: ResNet, target: int) -> None:
    """With global average pooling and one linear layer, Grad-CAM is CAM (Zhou et al. 2016) up to a factor."""
    images = planted(5, 6)[0]
    features = run_stages(finder, to_input(torch.from_numpy(images)), STAGES[:-1])
    maps = torch.einsum("c,nchw->nhw", finder.fc.weight[target], features).relu()
    large = F.interpolate(maps.unsqueeze(1), (SIDE, SIDE), mode="bilinear").squeeze(1)
    expected = large / large.amax((1, 2), keepdim=True).clamp(min=1e-30)
    np.testing.assert_allclose(gradcam.heatmaps(finder, images, target), expected, atol=1e-5)


def test_the_map_follows_the_evidence(finder: ResNet, squares: tuple[UInt8, Bools]) -> None:
    images, inside = squares
    heats = gradcam.heatmaps(finder, images)
    assert heats[inside].mean() > 2 * heats[~inside].mean()
    assert all(heat[place].mean() > heat[~place].mean() for heat, place in zip(heats, inside, strict=True))


@pytest.mark.parametrize("depth", range(1, 7))
def test_randomised_weights_change_the_map(finder: ResNet, squares: tuple[UInt8, Bools], depth: int) -> None:
    """Cascading from the top: Adebayo et al., Sanity Checks for Saliency Maps, 2018."""
    images = squares[0][:8]
    heats = gradcam.heatmaps(finder, images)
    found = []
    for seed in range(6):  # one draw of a head may agree by chance
        model, fresh = copy.deepcopy(finder), narrow_resnet(100 + seed)
        for stage in STAGES[-depth:]:
            for mine, other in zip(stage_modules(model, stage), stage_modules(fresh, stage), strict=True):
                mine.load_state_dict(other.state_dict())
        found.append(correlation(heats, gradcam.heatmaps(model, images)))
    assert correlation(heats, heats) > 0.999
    assert np.mean(found) < (0.3 if depth == len(STAGES) else 0.5)


def test_without_support_the_map_is_zero(finder: ResNet) -> None:
    model = copy.deepcopy(finder)
    torch.nn.init.zeros_(model.fc.weight)
    assert not gradcam.heatmaps(model, planted(0, 3)[0]).any()


def test_maps_do_not_depend_on_the_other_images(finder: ResNet) -> None:
    images = planted(3, 70)[0]
    heats = gradcam.heatmaps(finder, images)
    np.testing.assert_array_equal(gradcam.heatmaps(finder, images), heats)
    for place in (0, 31, 32, 69):
        np.testing.assert_allclose(gradcam.heatmaps(finder, [images[place]])[0], heats[place], atol=1e-4)


def test_read_only_images_are_accepted(finder: ResNet, tmp_path: Path) -> None:
    images = planted(3, 2)[0]
    images.tofile(tmp_path / "images")
    stored = np.memmap(tmp_path / "images", np.uint8, "r", shape=images.shape)
    np.testing.assert_array_equal(gradcam.heatmaps(finder, stored), gradcam.heatmaps(finder, images))


@pytest.mark.parametrize("mode", ["in use", "in training", "partly frozen"])
def test_the_model_is_not_changed(tiny: ResNet, mode: str) -> None:
    tiny.train(mode != "in use").requires_grad_(mode != "in use")
    if mode == "partly frozen":
        tiny.layer1.eval().requires_grad_(False)
    modes = [module.training for module in tiny.modules()]
    flags = [parameter.requires_grad for parameter in tiny.parameters()]
    before = checksum(tiny)
    heats = gradcam.heatmaps(tiny, planted(0, 2)[0])
    assert [module.training for module in tiny.modules()] == modes
    assert [parameter.requires_grad for parameter in tiny.parameters()] == flags
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())
    assert checksum(tiny) == before
    np.testing.assert_array_equal(gradcam.heatmaps(tiny.eval(), planted(0, 2)[0]), heats)


def test_a_failure_leaves_no_hook(tiny: ResNet) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        gradcam.heatmaps(tiny, planted(0, 2)[0], target=7)
    assert not any(module._forward_hooks for module in tiny.modules())
