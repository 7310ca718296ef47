"""Views: one augmented version of an image is a pure function of (seed, image, view number, recipe).

Geometry, plus what breaks the cues that come from the apparatus instead of the lung: exposure, sharpness, scale, aspect
and JPEG compression. A batch is transformed at once with separate parameters for each image, on whatever device
holds it. The order of the operations is the order of `COLUMNS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cxr.data.philox import uniform

Floats = npt.NDArray[np.float64]
# Column of the parameters -> its value if nothing is to be done. zoom_x, zoom_y: factors; flip: -1 mirrors left and
# right; angle: degrees; shift_x, shift_y: share of the side; marker: grey level, 0 to 1, of a letter in the corner;
# contrast: factor about the image's mean; brightness: share of white added; blur: sigma in pixels; quality: of the
# JPEG compression.
COLUMNS = {
    "zoom_x": 1.0,
    "zoom_y": 1.0,
    "flip": 1.0,
    "angle": 0.0,
    "shift_x": 0.0,
    "shift_y": 0.0,
    "marker": 0.0,
    "contrast": 1.0,
    "brightness": 0.0,
    "blur": 1e-3,
    "quality": 100.0,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How augmented views are drawn: `ranges` of uniform draws, those in `log` log-uniform, and the columns from them.

    A recipe never changes once released: runs name it, and cached activations depend on it.
    """

    ranges: Mapping[str, tuple[float, float]]
    log: frozenset[str]
    columns: Callable[[Mapping[str, Floats]], Mapping[str, Floats]]

    def draw(self, seed: int, keys: npt.NDArray[np.uint64], view: int) -> dict[str, Floats]:
        """Name -> draws [n] for one view of n images.

        Philox is counter-based: the draws of an image depend only on (seed, key, view), so neither order nor batch size
        nor a resumed run changes them.
        """
        table = uniform(seed, keys, view, len(self.ranges))
        return {name: self._scaled(name, column) for name, column in zip(self.ranges, table.T, strict=True)}

    def _scaled(self, name: str, uniform: Floats) -> Floats:
        low, high = np.log(self.ranges[name]) if name in self.log else np.array(self.ranges[name])
        scaled: Floats = low + uniform * (high - low)
        return np.exp(scaled) if name in self.log else scaled


def _mild(drawn: Mapping[str, Floats]) -> dict[str, Floats]:
    rest = {name: values for name, values in drawn.items() if name != "zoom"}
    return {"zoom_x": drawn["zoom"], "zoom_y": drawn["zoom"], **rest}


def _crops(drawn: Mapping[str, Floats], widest: float = np.inf) -> dict[str, Floats]:
    """A crop of `area` (share of the image) with aspect `ratio` about (x, y), resized to the whole, as torchvision's
    RandomResizedCrop (Szegedy et al. 2015, "Going Deeper with Convolutions"); mirrored if `flip` is below one half.

    `widest` limits its sides; one beyond 1 shows black at the border.
    """
    factors = (drawn["ratio"], 1 / drawn["ratio"])
    width, height = (np.minimum(np.sqrt(drawn["area"] * factor), widest) for factor in factors)
    own = ("angle", "contrast", "brightness", "blur", "quality")
    return {
        "zoom_x": 1 / width,
        "zoom_y": 1 / height,
        "flip": np.where(drawn["flip"] < 0.5, -1.0, 1.0),
        "shift_x": (drawn["x"] - 0.5) * (1 - width),
        "shift_y": (drawn["y"] - 0.5) * (1 - height),
        **{name: drawn[name] for name in own},
    }


RECIPES = {
    "mild-1": Recipe(
        {
            "zoom": (0.8, 1.25),
            "angle": (-10.0, 10.0),
            "shift_x": (-0.05, 0.05),
            "shift_y": (-0.05, 0.05),
            "contrast": (0.75, 1.3),
            "brightness": (-0.1, 0.1),
            "blur": (0.1, 1.2),
            "quality": (15.0, 70.0),
        },
        frozenset({"zoom"}),
        _mild,
    ),
    # Zoom and aspect separately, so that neither tells the class; the lungs are symmetric enough to be mirrored.
    "crops-1": Recipe(
        {
            "area": (0.08, 1.0),
            "ratio": (3 / 4, 4 / 3),
            "x": (0.0, 1.0),
            "y": (0.0, 1.0),
            "flip": (0.0, 1.0),
            "angle": (-10.0, 10.0),
            "contrast": (0.6, 1.6),
            "brightness": (-0.2, 0.2),
            "blur": (0.1, 1.2),
            "quality": (15.0, 70.0),
        },
        frozenset({"ratio"}),
        functools.partial(_crops, widest=1.0),
    ),
    # As crops-1, but enlarged less, by 1.2 in the median, and a quarter of the images look smaller (crops alone show
    # everything larger than it is at test: Touvron et al. 2019, "Fixing the train-test resolution discrepancy").
    "crops-2": Recipe(
        {
            "area": (0.35, 1.4),
            "ratio": (3 / 4, 4 / 3),
            "x": (0.0, 1.0),
            "y": (0.0, 1.0),
            "flip": (0.0, 1.0),
            "angle": (-10.0, 10.0),
            "contrast": (0.7, 1.4),
            "brightness": (-0.15, 0.15),
            "blur": (0.1, 1.2),
            "quality": (20.0, 95.0),
        },
        frozenset({"area", "ratio"}),
        _crops,
    ),
}
# Each changes one cue of the apparatus, at the edge of what training shows or a little beyond.
STRESSES: dict[str, dict[str, float]] = {
    "larger": {"zoom_x": 1.15, "zoom_y": 1.15},
    "smaller": {"zoom_x": 0.85, "zoom_y": 0.85},
    "flat": {"contrast": 0.7},
    "harsh": {"contrast": 1.4},
    "blurred": {"blur": 1.5},
    "compressed": {"quality": 20.0},
    "wide": {"zoom_x": 1.2},
    "narrow": {"zoom_y": 1.2},
    "marker": {"marker": 0.95},
}
# Named sets of stresses; like recipes, they never change.
STRESS_SETS = {"stresses-1": tuple(STRESSES)[:6], "stresses-2": tuple(STRESSES)}
Batch = tuple[Tensor, Tensor]  # (what enters a stage [b, ...], labels int64 [b])
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BLUR_RADIUS = 3
_PLAIN_KEY = -1  # in the names of cached files, which earlier versions made too
_FIRST_RECIPE = "mild-1"  # whose name is not in the names of cached files, as there was no other


@dataclass(frozen=True, slots=True)
class View:
    """How images are shown: as stored, augmented as view `number` of a recipe, or under the stress of that name."""

    number: int | None = None
    stress: str | None = None
    recipe: str = _FIRST_RECIPE

    def parameters(self, seed: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32] | None:
        """The parameters [n, c] of `augment` for images with these keys [n]; None where nothing is to be done."""
        if self.stress is not None:
            return stress_parameters(len(keys), self.stress)
        return None if self.number is None else view_parameters(seed, keys, self.number, self.recipe)

    def key(self, seed: int) -> tuple[int | str, ...]:
        """What names this view in a cache: the seed matters only where it draws the parameters."""
        if self.number is not None:
            return (seed, self.number) if self.recipe == _FIRST_RECIPE else (self.recipe, seed, self.number)
        return (_PLAIN_KEY,) if self.stress is None else (self.stress,)


PLAIN = View()


def image_key(digest: str) -> int:
    """A 64-bit number that stands for an image in `view_parameters`, from its sha256 in hex."""
    return int(digest[:16], 16)


def view_parameters(
    seed: int, keys: npt.NDArray[np.uint64], view: int, recipe: str = _FIRST_RECIPE
) -> npt.NDArray[np.float32]:
    """The parameters [n, c] of one view of n images, columns as in `COLUMNS`."""
    chosen = RECIPES[recipe]
    return _table(len(keys), chosen.columns(chosen.draw(seed, keys, view)))


def stress_parameters(images: int, stress: str) -> npt.NDArray[np.float32]:
    """The parameters [n, c], the same for each image, of one of `STRESSES`."""
    return _table(images, STRESSES[stress])


def _table(images: int, columns: Mapping[str, Floats | float]) -> npt.NDArray[np.float32]:
    values = [np.broadcast_to(columns.get(name, neutral), images) for name, neutral in COLUMNS.items()]
    return np.stack(values, 1).astype(np.float32)


def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """uint8 [n, s, s] and parameters [n, c] -> the views, whole grey levels 0 to 255 as float32 [n, s, s]."""
    by_name = dict(zip(COLUMNS, parameters.to(images.device).unbind(1), strict=True))
    x = _mark(_move(images.float(), by_name), by_name["marker"])
    x = _expose(x, by_name["contrast"], by_name["brightness"])
    return _compress(_blur(x, by_name["blur"]), by_name["quality"])


def to_input(images: Tensor) -> Tensor:
    """Grey levels [n, s, s] -> what the network takes: float32 [n, 3, s, s], by ImageNet's mean and std."""
    mean, std = (_kept_normalisation if images.is_cuda else _normalisation)(images.device)
    grey = images.float().div(255).unsqueeze(1)
    return ((grey - mean) / std).contiguous(memory_format=torch.channels_last)


def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and std [1, 3, 1, 1]."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


# Brought to a GPU once. Not for the CPU, where an export to ONNX would leave its stand-ins for tensors in the cache.
_kept_normalisation = functools.cache(_normalisation)


def _move(x: Tensor, by_name: Mapping[str, Tensor]) -> Tensor:
    """Mirror, zoom, rotate and shift about the centre; what comes in from outside is black."""
    turn = torch.deg2rad(by_name["angle"])
    cos, sin, flip = torch.cos(turn), torch.sin(turn), by_name["flip"]
    across, down = by_name["zoom_x"], by_name["zoom_y"]
    to_x = [flip * (cos / across), -(sin / down), 2 * by_name["shift_x"]]
    to_y = [flip * (sin / across), cos / down, 2 * by_name["shift_y"]]
    theta = torch.stack([*to_x, *to_y], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(x), 1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x.unsqueeze(1), grid, mode="bilinear", align_corners=False).squeeze(1)


def _mark(x: Tensor, level: Tensor) -> Tensor:
    """Draw the letter L into the upper left corner where `level` is above 0, as technicians mark the side of a film."""
    letter = _letter(x.shape[-1], x.device) & (level > 0).view(-1, 1, 1)
    return torch.where(letter, 255 * level.view(-1, 1, 1), x)


@functools.cache
def _letter(side: int, device: torch.device) -> Tensor:
    """Which pixels [side, side] the letter covers: a tenth of the side high, and half as wide."""
    at = torch.arange(side, device=device) / side
    row, column = at.view(-1, 1), at.view(1, -1)
    upright = (row >= 0.04) & (row < 0.14) & (column >= 0.04) & (column < 0.06)
    foot = (row >= 0.12) & (row < 0.14) & (column >= 0.04) & (column < 0.09)
    return upright | foot


def _expose(x: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    mean = x.mean((1, 2), keepdim=True)
    return ((x - mean) * contrast.view(-1, 1, 1) + mean + 255 * brightness.view(-1, 1, 1)).clamp(0, 255)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian, separable, one kernel for each image: as a convolution whose groups are the images."""
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).view(len(x), 1, 1, -1)
    padded = F.pad(x.unsqueeze(0), [_BLUR_RADIUS] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=len(x))
    return F.conv2d(rows, kernel.transpose(2, 3), groups=len(x)).squeeze(0)


# ITU-T T.81, table K.1: luminance quantisation at quality 50.
_QUANTISATION = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


@functools.cache
def _codec(device: torch.device) -> tuple[Tensor, Tensor]:
    """(the quantisation table, the orthonormal DCT-II of length 8), each [8, 8], copied to the device once."""
    return torch.tensor(_QUANTISATION, dtype=torch.float32, device=device), _dct_matrix().to(device)


def _dct_matrix() -> Tensor:
    k = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * k + 1) * k.unsqueeze(1) * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _compress(x: Tensor, quality: Tensor) -> Tensor:
    """What JPEG at the given quality leaves of the grey levels: the lossy part of the codec, without the file.

    Quality scales the table as in libjpeg (Independent JPEG Group, `jpeg_quality_scaling`).
    """
    quality = quality.round()
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    table, dct = _codec(x.device)
    steps = ((table * scale.view(-1, 1, 1) + 50) / 100).floor().clamp(1, 255)
    n, height, width = x.shape
    beyond = [0, -width % 8, 0, -height % 8]
    blocks = F.pad(x.unsqueeze(1), beyond, mode="replicate") if any(beyond) else x.unsqueeze(1)
    blocks = blocks.view(n, blocks.shape[2] // 8, 8, blocks.shape[3] // 8, 8).transpose(2, 3)
    steps = steps.view(n, 1, 1, 8, 8)
    coefficients = (dct @ (blocks.round() - 128) @ dct.T / steps).round() * steps
    restored = (dct.T @ coefficients @ dct + 128).round().clamp(0, 255).transpose(2, 3)
    return restored.flatten(3, 4).flatten(1, 2)[:, :height, :width]
