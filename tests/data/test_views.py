"""Views: the effect of each parameter, dependence on (seed, image, view) only, and JPEG compared with Pillow."""

import io
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cxr.config import TrainConfig
from cxr.data.phantoms import phantom
from cxr.data.views import (
    COLUMNS,
    RECIPES,
    STRESS_SETS,
    STRESSES,
    View,
    _compress,
    augment,
    image_key,
    stress_parameters,
    to_input,
    view_parameters,
)
from cxr.parameters import spec_of

NEUTRAL = {**COLUMNS, "blur": 0.1}
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
keys_of = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12)


def films(count: int, size: int = 64) -> Tensor:
    drawn = [phantom(np.random.default_rng(n), "normal", size) for n in range(count)]
    return torch.from_numpy(np.stack(drawn))


def disc(size: int = 64, radius: int = 12, dx: int = 0, dy: int = 0) -> Tensor:
    """A white disc on dark grey."""
    across = torch.arange(size) - (size - 1) / 2
    inside = (across - dx) ** 2 + (across.view(-1, 1) - dy) ** 2 < radius**2
    return torch.where(inside, 200, 40).to(torch.uint8)


def changed(image: Tensor, **parameters: float) -> Tensor:
    """The view of one image with the given parameters, the others neutral and almost no compression."""
    if "zoom" in parameters:
        zoom = parameters.pop("zoom")
        parameters |= {"zoom_x": zoom, "zoom_y": zoom}
    row = {**NEUTRAL, **parameters}
    return augment(image.unsqueeze(0), torch.tensor([[float(row[name]) for name in COLUMNS]]))[0]


def centre_of_white(image: Tensor) -> tuple[float, float]:
    y, x = torch.nonzero(image > 120).double().mean(0).tolist()
    return x, y


# Parameters


@settings(max_examples=40)
@given(st.integers(0, 10**9), keys_of, st.integers(0, 1000), st.sampled_from(list(RECIPES)))
def test_draws_lie_within_their_ranges(seed: int, keys: list[int], view: int, recipe: str) -> None:
    drawn = RECIPES[recipe].draw(seed, np.array(keys, np.uint64), view)
    for name, (low, high) in RECIPES[recipe].ranges.items():
        assert drawn[name].shape == (len(keys),)
        assert np.all((drawn[name] >= low - 1e-9) & (drawn[name] <= high + 1e-9))
    table = view_parameters(seed, np.array(keys, np.uint64), view, recipe)
    assert (table.shape, table.dtype) == ((len(keys), len(COLUMNS)), np.float32)


@settings(max_examples=40)
@given(st.integers(0, 10**9), keys_of, st.integers(0, 1000))
def test_a_crop_lies_within_the_image_and_has_its_area_and_ratio(seed: int, keys: list[int], view: int) -> None:
    drawn = RECIPES["crops-1"].draw(seed, np.array(keys, np.uint64), view)
    table = dict(zip(COLUMNS, view_parameters(seed, np.array(keys, np.uint64), view, "crops-1").T, strict=True))
    width, height = 1 / table["zoom_x"], 1 / table["zoom_y"]
    for size, shift in ((width, table["shift_x"]), (height, table["shift_y"])):
        assert np.all(size <= 1 + 1e-6)
        assert np.all(np.abs(shift) + size / 2 <= 0.5 + 1e-6)
    whole = np.sqrt(drawn["area"] * np.maximum(drawn["ratio"], 1 / drawn["ratio"])) <= 1
    np.testing.assert_allclose((width * height)[whole], drawn["area"][whole], rtol=1e-5)
    np.testing.assert_allclose((width / height)[whole], drawn["ratio"][whole], rtol=1e-5)
    assert set(np.unique(table["flip"])) <= {-1, 1}


def test_mild_views_are_those_of_version_0_1() -> None:
    keys = np.array([7, 2**63 + 1], np.uint64)
    expected = [
        [1.0354, 1.0354, 1, 2.978, -0.0141, -0.0145, 0, 0.9906, -0.0913, 0.9919, 65.238],
        [0.9209, 0.9209, 1, -3.9961, -0.0453, -0.0339, 0, 0.8558, -0.0509, 1.0265, 48.851],
    ]
    np.testing.assert_allclose(view_parameters(3, keys, 2), expected, atol=1e-4)
    assert View(2).key(3) == (3, 2)
    assert View(2, recipe="crops-1").key(3) == ("crops-1", 3, 2)


def test_recipes_and_stresses_are_the_choices_of_their_parameters() -> None:
    specs = {item.name: spec_of(item) for item in fields(TrainConfig)}
    assert set(specs["augment"].choices) == set(RECIPES)
    assert set(specs["stresses"].choices) == set(STRESS_SETS)


@settings(max_examples=40)
@given(keys_of, st.randoms(use_true_random=False))
def test_parameters_of_an_image_depend_on_no_other_image(keys: list[int], random: Any) -> None:
    order = list(range(len(keys)))
    random.shuffle(order)
    table = view_parameters(3, np.array(keys, np.uint64), 1)
    np.testing.assert_array_equal(view_parameters(3, np.array(keys, np.uint64)[order], 1), table[order])
    np.testing.assert_array_equal(view_parameters(3, np.array(keys[-1:], np.uint64), 1)[0], table[-1])


@pytest.mark.parametrize("key", [0, 5, 2**63, 2**64 - 2])
def test_seed_image_and_view_each_change_the_parameters(key: int) -> None:
    drawn = [
        np.concatenate(list(RECIPES["mild-1"].draw(seed, np.array([image], np.uint64), view).values()))
        for seed, image, view in ((0, key, 0), (1, key, 0), (0, key + 1, 0), (0, key, 1))
    ]
    assert len(np.unique(np.stack(drawn), axis=0)) == 4
    assert np.abs(np.diff(np.stack(drawn), axis=0)).min() > 0  # no parameter is shared either


@each_recipe
def test_draws_are_spread_evenly_over_their_ranges(recipe: str) -> None:
    chosen = RECIPES[recipe]
    drawn = chosen.draw(0, np.arange(1500, dtype=np.uint64), 0)
    for name, column in drawn.items():
        scale = np.log if name in chosen.log else np.asarray
        low, high = scale(chosen.ranges[name])
        quantiles = np.quantile(scale(column), [0.02, 0.25, 0.5, 0.75, 0.98])
        np.testing.assert_allclose((quantiles - low) / (high - low), [0.02, 0.25, 0.5, 0.75, 0.98], atol=0.05)
    assert np.abs(np.corrcoef(np.stack(list(drawn.values()))) - np.eye(len(drawn))).max() < 0.1


def test_image_key_is_the_first_64_bits_of_the_digest() -> None:
    assert image_key("00000000000000ff" + "a" * 48) == 255
    assert image_key("f" * 64) == 2**64 - 1


# Views


def test_a_view_keeps_the_size_and_gives_whole_grey_levels() -> None:
    for size in (40, 45, 64):
        images = films(3, size)
        seen = augment(images, torch.from_numpy(view_parameters(0, np.arange(3, dtype=np.uint64), 0)))
        assert seen.shape == images.shape
        assert seen.dtype == torch.float32
        assert seen.min() >= 0
        assert seen.max() <= 255
        assert torch.equal(seen, seen.round())


def test_a_view_is_the_same_in_any_batch_and_does_not_change_its_input() -> None:
    images, parameters = films(7), torch.from_numpy(view_parameters(0, np.arange(7, dtype=np.uint64), 0))
    before = images.clone()
    whole = augment(images, parameters)
    for size in (1, 3):
        halves = zip(torch.split(images, size), torch.split(parameters, size), strict=True)
        parts = [augment(*half) for half in halves]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(images, before)
    assert (whole != images).float().mean() > 0.5


def test_neutral_parameters_leave_the_image() -> None:
    image = films(1)[0]
    assert (changed(image) - image).abs().max() <= 1


def test_zoom_above_one_enlarges_about_the_centre() -> None:
    white = {zoom: (changed(disc(), zoom=zoom) > 120) for zoom in (0.8, 1.0, 1.25)}
    areas = {zoom: float(mask.sum()) for zoom, mask in white.items()}
    assert areas[1.25] / areas[1.0] == pytest.approx(1.25**2, rel=0.08)
    assert areas[0.8] / areas[1.0] == pytest.approx(0.8**2, rel=0.08)
    assert centre_of_white(changed(disc(), zoom=1.25)) == pytest.approx((31.5, 31.5), abs=0.3)


def test_pixels_from_outside_the_image_are_black() -> None:
    small = changed(torch.full((64, 64), 200, dtype=torch.uint8), zoom=0.5)
    assert small[:14].max() < 5
    assert small[18:46, 18:46].min() > 195


def test_shifts_are_fractions_of_the_side_along_their_axis() -> None:
    x, y = centre_of_white(changed(disc(), shift_x=0.125))
    assert (abs(x - 31.5), y) == pytest.approx((8, 31.5), abs=0.3)
    x, y = centre_of_white(changed(disc(), shift_y=0.125))
    assert (x, abs(y - 31.5)) == pytest.approx((31.5, 8), abs=0.3)


def test_a_right_angle_rotates_and_does_not_mirror() -> None:
    image = disc(dx=15, dy=6)
    turned = changed(image, angle=90)
    assert min((turned - torch.rot90(image, k).float()).abs().max() for k in (1, -1)) <= 2
    assert min((turned - torch.rot90(image.T, k).float()).abs().max() for k in (1, -1)) > 50


def test_brightness_adds_a_share_of_white_and_contrast_scales_about_the_mean() -> None:
    image = disc()
    mean, spread = image.float().mean(), image.float().std()
    lit, flat = changed(image, brightness=0.1), changed(image, contrast=0.75)
    assert float(lit.mean() - mean) == pytest.approx(25.5, abs=1)
    assert float(lit.std()) == pytest.approx(float(spread), rel=0.02)
    assert float(flat.std() / spread) == pytest.approx(0.75, abs=0.02)
    assert float(flat.mean()) == pytest.approx(float(mean), abs=1)


def test_exposure_clips_instead_of_wrapping() -> None:
    image = torch.full((64, 64), 250, dtype=torch.uint8)
    assert changed(image, brightness=0.1).min() == 255
    assert changed(image - 245, brightness=-0.1).max() == 0


def test_blur_spreads_an_edge_as_a_gaussian_does() -> None:
    edge = torch.zeros(64, 64, dtype=torch.uint8)
    edge[:, 32:] = 255
    profile = changed(edge, blur=1.2)[32] / 255
    normal = (1 + torch.erf((torch.arange(64) - 31.5) / (1.2 * 2**0.5))) / 2
    assert (profile - normal).abs().max() < 0.04
    sharpness = [float(changed(edge, blur=sigma)[32].diff().max()) for sigma in (0.1, 0.6, 1.2)]
    assert sharpness == sorted(sharpness, reverse=True)
    assert sharpness[0] > 1.5 * sharpness[2]


def test_blur_is_independent_for_each_image() -> None:
    images = torch.stack([disc(), disc()])
    rows = torch.tensor([[float({**NEUTRAL, "blur": b}[name]) for name in COLUMNS] for b in (0.1, 1.2)])
    sharp, soft = augment(images, rows)
    assert torch.equal(sharp, changed(disc()))
    assert torch.equal(soft, changed(disc(), blur=1.2))
    assert not torch.equal(sharp, soft)


# Stresses


def extent(image: Tensor) -> tuple[int, int]:
    """(width, height) of what is white."""
    y, x = torch.nonzero(image > 120).T
    return int(x.max() - x.min() + 1), int(y.max() - y.min() + 1)


@pytest.mark.parametrize(("stress", "sides"), [("wide", (29, 24)), ("narrow", (24, 29)), ("larger", (27, 27))])
def test_stretching_changes_one_side_and_zooming_both(stress: str, sides: tuple[int, int]) -> None:
    seen = augment(disc().unsqueeze(0), torch.from_numpy(stress_parameters(1, stress)))[0]
    assert extent(disc()) == (24, 24)
    assert np.abs(np.array(extent(seen)) - sides).max() <= 1


def test_a_marker_is_drawn_into_the_corner_and_changes_nothing_else() -> None:
    seen = changed(disc(), marker=0.95, blur=1e-3)
    different = torch.nonzero(seen != changed(disc(), blur=1e-3))
    assert 10 < len(different) < 60
    assert different.max() < 16
    assert seen[different[:, 0], different[:, 1]].max() > 200


def test_mirroring_swaps_left_and_right() -> None:
    image = films(1)[0]
    assert torch.equal(changed(image, flip=-1.0), changed(image.flip(1)))


def test_every_stress_changes_images() -> None:
    images = films(2)
    plain = augment(images, torch.from_numpy(stress_parameters(2, "larger") * 0) + torch.tensor(list(COLUMNS.values())))
    for stress in STRESSES:
        assert not torch.equal(augment(images, torch.from_numpy(stress_parameters(2, stress))), plain)


# JPEG


def through_pillow(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file), np.float32))


@pytest.mark.parametrize("quality", [15, 30, 49, 50, 70])
@pytest.mark.parametrize("size", [64, 61])
def test_compression_agrees_with_pillows_jpeg(size: int, quality: int) -> None:
    """Equal for nearly all pixels: libjpeg's integer DCT rounds coefficients near a tie differently."""
    images = films(4, size)
    expected = torch.stack([through_pillow(image, quality) for image in images])
    difference = (_compress(images.float(), torch.full((4,), float(quality))) - expected).abs()
    assert (difference > 3).float().mean() < 0.03
    assert difference.mean() < 0.25
    assert (expected - images).abs().mean() > 10 * difference.mean()  # the agreement is not the images' own


def test_compression_loses_more_at_lower_quality_and_is_independent_for_each_image() -> None:
    image = films(1).float()
    qualities = torch.tensor([15.0, 40.0, 70.0])
    together = _compress(image.expand(3, -1, -1), qualities)
    lost = (together - image).abs().mean((1, 2))
    assert lost[0] > lost[1] > lost[2] > 0
    for quality, alone in zip(qualities, together, strict=True):
        assert torch.equal(_compress(image, quality.view(1))[0], alone)


def test_compression_accepts_any_memory_layout() -> None:
    image = films(2).float()
    quality = torch.tensor([20.0, 60.0])
    turned = image.transpose(1, 2)
    assert torch.equal(_compress(turned, quality), _compress(turned.contiguous(), quality))


# Input of the network


def test_input_is_three_equal_channels_by_imagenets_mean_and_std() -> None:
    x = to_input(torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8))
    assert x.shape == (1, 3, 2, 2)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x[0, :, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-5)
    np.testing.assert_allclose(x[0, :, 0, 1], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rtol=1e-5)


def test_a_view_and_the_stored_image_are_normalised_to_the_same_scale() -> None:
    image = films(1)
    assert torch.equal(to_input(image), to_input(image.float()))
