"""Seeded phantom chest X-rays: the default data set, also used by the tests.

The phantoms are drawn in a body frame: x runs from the patient's right (image left, negative) to the left,
y from head to feet, and an exactly framed image spans -1 to 1 on both axes. Shadows add up as attenuation,
which is then transformed to the pose and exposed like a film. Everything except the pathology comes from
one random stream that is independent of the class, so equal seeds give the same patient, healthy or ill.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Kind = Literal["normal", "bacteria", "virus"]
Gray = NDArray[np.floating[Any]]
GrayBytes = NDArray[np.uint8]
VERSION = 2
MIN_SIZE = 32
MIN_PATIENTS = 4
VAL_IMAGES = 8
NORMAL_SHARE = {"train": 0.25, "test": 0.38}
BACTERIA_SHARE = 2 / 3
JPEG_QUALITY = 90
MARKER = "synthetic.json"

# Half the width of the drawn field: more than 1, so that a rotated or shifted patient still fills the film.
_FIELD = 1.25
_HILUM = (0.21, -0.06)

# Widths from the great vessels down to the diaphragm; the left border has the aortic knob and the apex.
_LEFT_BORDER = (0.10, 0.13, 0.17, 0.15, 0.26, 0.38, 0.43, 0.40)
_RIGHT_BORDER = (0.11, 0.13, 0.14, 0.18, 0.21, 0.19)


@dataclass(frozen=True)
class Anatomy:
    """The anatomy of a patient, the same in all films of that patient.

    Lengths are in half image widths, `tilt` and `rib_angle` are slopes, and the rest are factors around 1.
    """

    lung_width: float
    lung_top: float
    lung_base: float
    dome_depth: float
    heart_size: float
    heart_reach: float
    thymus: float
    rib_count: float
    rib_angle: float
    rib_curve: float
    rib_density: float
    clavicle_height: float
    tilt: float
    bend: float
    body_width: float
    arm_angle: float
    vessel_density: float
    contrast: float


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Return the anatomy of one patient, drawn from `rng`."""
    return Anatomy(
        lung_width=rng.uniform(0.66, 0.80),
        lung_top=rng.uniform(-0.80, -0.68),
        lung_base=rng.uniform(0.36, 0.52),
        dome_depth=rng.uniform(0.18, 0.30),
        heart_size=rng.uniform(0.86, 1.14),
        heart_reach=rng.uniform(-0.12, 0.16),
        thymus=max(0.0, rng.normal(0.02, 0.04)),
        rib_count=rng.uniform(9.0, 11.5),
        rib_angle=rng.uniform(0.02, 0.14),
        rib_curve=rng.uniform(0.14, 0.26),
        rib_density=rng.uniform(0.75, 1.25),
        clavicle_height=rng.uniform(-0.76, -0.66),
        tilt=rng.normal(0, 0.025),
        bend=rng.normal(0, 0.02),
        body_width=rng.uniform(1.10, 1.26),
        arm_angle=rng.uniform(0.15, 1.1),
        vessel_density=rng.uniform(0.7, 1.4),
        contrast=rng.uniform(0.88, 1.12),
    )


@dataclass(frozen=True)
class _Chest:
    """The geometry of a patient on the pixel grid, from which shadows and lesions are drawn."""

    anatomy: Anatomy
    x: Gray
    y: Gray
    outer: Gray
    dome: Gray
    heart: Gray
    air: Gray
    arm: Gray

    @property
    def size(self) -> int:
        return int(self.x.shape[1])


@dataclass(frozen=True)
class _Lesion:
    """The fraction of lung air that is replaced, and the streaks on top; both [size, size]."""

    fill: Gray
    streaks: Gray


@cache
def _grid(size: int) -> tuple[Gray, Gray]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * _FIELD
    return axis[None, :], axis[:, None]


@cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height)


def _clip(values: Gray, low: float, high: float) -> Gray:
    clipped: Gray = np.maximum(values, low)
    np.minimum(clipped, high, out=clipped)
    return clipped


def _edge(depth: Gray, soft: float) -> Gray:
    """Return 0 outside, 1 inside and a ramp of width `soft` between, given the depth inside."""
    ramp: Gray = depth * (1 / soft)
    ramp += 0.5
    np.maximum(ramp, 0, out=ramp)
    np.minimum(ramp, 1, out=ramp)
    return ramp


def _falloff(squared: Gray) -> Gray:
    """Return (1 - squared) squared, 0 where `squared` exceeds 1."""
    rest: Gray = 1 - squared
    np.maximum(rest, 0, out=rest)
    rest *= rest
    return rest


def _bell(offset: Gray, width: float) -> Gray:
    """Return a compact bump, 1 where `offset` is 0 and 0 beyond `width`; much cheaper than a Gaussian."""
    rest: Gray = offset * (1 / width)
    rest *= rest
    return _falloff(rest)


def _blob(chest: _Chest, centre: tuple[float, float], radius: tuple[float, float]) -> Gray:
    dx = (chest.x - centre[0]) * (1 / radius[0])
    dy = (chest.y - centre[1]) * (1 / radius[1])
    dx *= dx
    return _falloff(dx + dy * dy)


def _soften(film: Gray, share: float) -> Gray:
    """Return the film blurred: `share` of each pixel's value spreads to either neighbour, on both axes."""
    for _ in range(2):
        film = film.T.copy()
        film[1:-1] = (1 - 2 * share) * film[1:-1] + share * (film[:-2] + film[2:])
    return film


def _clouds(rng: np.random.Generator, size: int, cells: int) -> Gray:
    """Return smooth noise of about unit standard deviation with `cells` bumps per side, [size, size]."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return smooth * 1.4


def _profile(y: Gray, heights: list[float], values: list[float]) -> Gray:
    """Return the values at `heights` interpolated at each row of `y` and smoothed."""
    shifts = (-0.06, -0.03, 0.0, 0.03, 0.06)
    rounded = sum(np.interp(y[:, 0] + shift, heights, values) for shift in shifts) / len(shifts)
    return np.asarray(rounded, dtype=np.float32)[:, None]


def _wide(a: Anatomy, border: tuple[float, ...]) -> list[float]:
    """Return the widths of a heart border for this patient, stretched more towards the diaphragm."""
    return [a.heart_size * width * (1 + a.heart_reach * i / len(border)) for i, width in enumerate(border)]


def _heart(x: Gray, y: Gray, a: Anatomy) -> Gray:
    """Return the cardiomediastinal silhouette: great vessels above the heart, with its apex to the patient's left."""
    low = (y - a.lung_base) / a.heart_size
    bulge = a.thymus * 2 * _bell(low + 0.85, 0.35)
    left = _profile(low, [-1.2, -0.9, -0.75, -0.62, -0.4, -0.2, -0.05, 0.12], _wide(a, _LEFT_BORDER)) + bulge
    right = _profile(low, [-1.2, -0.9, -0.6, -0.4, -0.2, 0.05], _wide(a, _RIGHT_BORDER)) + bulge
    span = _edge(0.16 - low, 0.08) * _edge(low + 1.1, 0.25)
    return _edge(left - x, 0.04) * _edge(x + right, 0.04) * span


def _chest(a: Anatomy, breath: float, size: int) -> _Chest:
    """Return the geometry of patient `a` with the diaphragm `breath` lower than on an average film."""
    across, y = _grid(size)
    x = across - a.tilt * y - a.bend * y * y
    ax = np.abs(x)
    base = a.lung_base + breath
    t = _clip((y - a.lung_top) / (base + a.dome_depth - a.lung_top), 0, 1)
    outer = a.lung_width * np.sqrt(1 - np.abs(1 - t) ** 2.8)
    slope = (ax - 0.45 * a.lung_width) / (0.55 * a.lung_width)
    drop = a.dome_depth * slope * (slope * _clip(slope * 99, 0.3, 1))
    # The liver raises the right dome of the diaphragm.
    dome = base + _clip(x * 0.2, -0.03, 0.03) + drop
    heart = _heart(x, y, a)
    air = _edge(outer - ax, 0.04) * _edge(ax - 0.11, 0.05) * _edge(dome - y, 0.03) * (1 - heart)
    return _Chest(a, x, y, outer, dome, heart, air, _arm_axis(a, ax, y))


def _arm_axis(a: Anatomy, ax: Gray, y: Gray) -> Gray:
    """Return the squared distance from the axis of the nearer arm, which starts at the shoulder."""
    cos, sin = math.cos(a.arm_angle), math.sin(a.arm_angle)
    dx, dy = ax - 0.80 * a.body_width, y + 0.68
    along = _clip(dx * cos + dy * sin, 0, 9)
    dx, dy = dx - along * cos, dy - along * sin
    return dx * dx + dy * dy


def _body(chest: _Chest) -> Gray:
    """Return the soft tissue's attenuation: trunk, neck, chin and arms."""
    a = chest.anatomy
    heights = [-1.0, -0.92, -0.84, -0.76, -0.6, -0.2, 0.4, 1.2]
    widths = [0.36, 0.42, 0.66, 0.90, 0.96, 0.94, 0.90, 0.94]
    across = np.square(chest.x / _profile(chest.y, heights, [w * a.body_width * 0.84 for w in widths]))
    trunk = _clip(1 - across * across, 0, 1)
    arms = 0.55 * _clip(1 - chest.arm / 0.2**2, 0, 1)
    top = chest.size // 4
    chin = 1 - np.square(chest.x[:top] / 0.36) - np.square((chest.y[:top] + 1.22) / 0.30)
    body = 0.56 * np.sqrt(_clip(np.maximum(trunk, 0.3 * trunk + arms), 0, 1))
    body[:top] += 0.30 * np.sqrt(_clip(chin, 0, 1))
    return body


def _spine(chest: _Chest) -> Gray:
    """Return the vertebral column, its discs and spinous processes, and the airway in front of it."""
    middle = slice(chest.size * 3 // 8, -(-chest.size * 5 // 8))
    x, y = chest.x[:, middle], chest.y
    ax, phase = np.abs(x), (y * 7.2) % 1
    bodies = 0.75 + 0.25 * _edge(np.abs(phase - 0.5) - 0.16, 0.12)
    column = _edge(0.115 - ax, 0.04) * bodies * 0.14
    pedicles = _bell(ax - 0.07, 0.03) * _bell(phase - 0.5, 0.3) * 0.06
    process = _bell(ax, 0.025) * _bell(phase - 0.85, 0.2) * 0.06
    trachea = _bell(x, 0.07) * _edge(-0.25 - y, 0.2) * 0.13
    spine = np.zeros_like(chest.x)
    spine[:, middle] = column + pedicles + process - trachea
    return spine


@cache
def _tube() -> Gray:
    """Return one period of a rib's profile: a bright cortex around a fainter marrow, then a gap."""
    place = np.arange(256, dtype=np.float32) / 256
    upper, lower = _bell(place - 0.18, 0.09), _bell(place - 0.50, 0.07)
    return 0.55 * _edge(0.19 - np.abs(place - 0.34), 0.08) + 0.45 * (upper + lower)


def _tubes(phase: Gray) -> Gray:
    tubes: Gray = np.take(_tube(), (phase * 256).astype(np.int16) & 255)
    return tubes


def _ribs(chest: _Chest) -> Gray:
    """Return all ribs at once: one profile repeats along y, bent by the distance from the midline."""
    a, y, ax = chest.anatomy, chest.y, np.abs(chest.x)
    scale = a.rib_count / 1.6
    u = ax / a.lung_width
    back = y - a.rib_angle * u - a.rib_curve * np.square(u * u) + 0.10 * _bell(u - 0.4, 0.5)
    front = y + 0.45 * (u - 1) - 0.15 * u * u
    cage = _edge(chest.outer + 0.045 - ax, 0.02)
    fade = cage * (0.3 + 0.7 * _edge(chest.dome - y, 0.25)) * a.rib_density
    rear = _tubes(back * scale) * _edge(ax - 0.08, 0.04)
    fore = _tubes(front * (scale * 0.84)) * _edge(ax - 0.45 * a.lung_width, 0.4)
    # Ribs run along the beam where they turn round the flank, so the wall shows as a bright line.
    wall = _bell(ax - chest.outer - 0.02, 0.05) * (0.4 + rear) * _edge(y + 0.7, 0.2)
    return fade * (0.12 * rear + 0.045 * fore + 0.09 * wall)


def _shoulders(chest: _Chest) -> Gray:
    """Return clavicles, humeri with their heads, and the edge of the shoulder blades."""
    top = chest.size // 2
    y, ax = chest.y[:top], np.abs(chest.x[:top])
    u = ax / 0.62
    path = chest.anatomy.clavicle_height + 0.06 - 0.13 * u + 0.04 * np.sin(6 * u)
    span = _edge(ax - 0.10, 0.05) * _edge(0.66 - ax, 0.08)
    away = np.abs(y - path)
    clavicles = (_edge(0.034 - away, 0.02) + _bell(away - 0.028, 0.014)) * span * 0.11
    heads = _edge(0.07**2 - chest.arm[:top], 0.002) * _bell(y + 0.66, 0.16)
    bones = 0.12 * np.sqrt(_clip(1 - chest.arm / 0.055**2, 0, 1))
    blades = _bell(ax - 0.80 + 0.25 * (y + 0.5), 0.03) * _bell(y + 0.45, 0.32)
    bones[:top] = np.maximum(bones[:top], 0.12 * heads) + clavicles + 0.05 * blades
    return bones


def _abdomen(rng: np.random.Generator, chest: _Chest) -> Gray:
    """Return the attenuation below the diaphragm: liver and bowel, often with gas in the stomach."""
    cage = _edge(chest.outer + 0.02 - np.abs(chest.x), 0.06)
    below = _edge(chest.y - chest.dome, 0.04) * cage
    centre = (rng.uniform(0.25, 0.5), chest.anatomy.lung_base + rng.uniform(0.22, 0.36))
    gas = _blob(chest, centre, (rng.uniform(0.10, 0.26), rng.uniform(0.07, 0.15)))
    amount = 0.24 * max(0.0, rng.uniform(-0.5, 1))
    return below * (0.17 - amount * np.sqrt(gas))


def _branches(rng: np.random.Generator, size: int, count: int, reach: float, width: float) -> Gray:
    """Return `count` forking lines per lung that leave the hilum and taper, [size, size] in 0 to 1."""
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    unit = size / (2 * _FIELD)
    jitter = rng.normal(0, 0.32, (2, count, 8))
    fan = np.linspace(-1.35, 1.45, count)
    length = rng.uniform(0.4, 1.25, (2, count)) * reach * unit
    for side in range(2):
        sign = 2 * side - 1
        for i in range(count):
            turns = [float(v) for v in jitter[side, i]]
            height = _HILUM[1] + 0.12 * math.sin(fan[i]) + 0.1 * turns[7]
            start = ((_FIELD + sign * _HILUM[0]) * unit, (_FIELD + height) * unit)
            _vessel(draw, start, float(fan[i]), turns, sign * float(length[side, i]), width * size / 224)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.7 * size / 224)), dtype=np.float32) / 255


def _vessel(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    angle: float,
    turns: list[float],
    reach: float,
    width: float,
) -> None:
    """Draw a vessel with four bends, and a branch at each, from `start` (pixels); leftward if `reach` < 0."""
    heading, (x, y) = angle, start
    for step in range(4):
        heading += turns[step]
        fade = 1 - 0.2 * step
        across, down = reach * 0.27, abs(reach) * 0.27
        x2, y2 = x + across * math.cos(heading), y + down * math.sin(heading)
        draw.line((x, y, x2, y2), fill=int(230 * fade), width=max(1, round(width * fade)))
        twig = heading + math.copysign(0.5, turns[4 + step]) + turns[4 + step]
        end = (x2 + across * 0.9 * math.cos(twig), y2 + down * 0.9 * math.sin(twig))
        draw.line((x2, y2, *end), fill=int(150 * fade), width=max(1, round(width * fade * 0.5)))
        x, y = x2, y2


def _markings(rng: np.random.Generator, chest: _Chest) -> Gray:
    """Return vessels and hila, as visible against aerated lung."""
    lines = _branches(rng, chest.size, 10, 0.75, 2.6)
    hila = _blob(chest, (-_HILUM[0], _HILUM[1] + 0.02), (0.16, 0.26))
    hila += _blob(chest, _HILUM, (0.16, 0.26))
    weight = chest.anatomy.vessel_density * rng.uniform(0.6, 1.5)
    return weight * (0.075 * lines + 0.09 * hila)


def _consolidation(rng: np.random.Generator, chest: _Chest) -> _Lesion:
    """Return one or two dense patches, each within a lobe, sometimes with an effusion on the same side."""
    a, side = chest.anatomy, float(rng.choice((-1.0, 1.0)))
    ragged = _clouds(rng, chest.size, 9) * 0.22 + _clouds(rng, chest.size, 22) * 0.10
    fill = np.zeros_like(chest.air)
    strength = rng.uniform(0.65, 1.0)
    for extra in range(1 + int(rng.random() < 0.4)):
        lobe = float(rng.choice((0.28, 0.55, 0.80), p=(0.25, 0.3, 0.45)))
        y = a.lung_top + (a.lung_base - a.lung_top) * (lobe + rng.normal(0, 0.05))
        centre = (side * a.lung_width * rng.uniform(0.42, 0.78), y)
        radius = (rng.uniform(0.40, 0.72), rng.uniform(0.38, 0.68))
        depth = np.sqrt(_blob(chest, centre, radius)) * 2 - 0.55
        patch = _clip(depth + ragged * (depth > -0.5), 0, 1) * (strength * (1 - 0.3 * extra))
        fill = np.maximum(fill, patch)
        side = side if rng.random() < 0.7 else -side
    if rng.random() < 0.25:
        fill = np.maximum(fill, _effusion(rng, chest, side))
    return _Lesion(fill, np.zeros_like(fill))


def _effusion(rng: np.random.Generator, chest: _Chest, side: float) -> Gray:
    """Return fluid that fills one costophrenic angle and climbs the flank."""
    a = chest.anatomy
    lateral = _clip(chest.x * (side / a.lung_width), 0, 1)
    level = a.lung_base + a.dome_depth - rng.uniform(0.15, 0.40) * lateral * lateral * lateral
    return _edge(chest.y - level, 0.10) * (lateral > 0) * rng.uniform(0.7, 0.95)


def _interstitial(rng: np.random.Generator, chest: _Chest) -> _Lesion:
    """Return perihilar haze on both sides, with a reticular pattern on top."""
    strength = rng.uniform(0.7, 1.1)
    spread = (rng.uniform(0.55, 0.85), rng.uniform(0.6, 0.95))
    height = _HILUM[1] + rng.uniform(0, 0.15)
    around = _blob(chest, (-0.26, height), spread) + _blob(chest, (0.26, height), spread)
    patchy = _clip(1 + 0.4 * _clouds(rng, chest.size, 10), 0, math.inf)
    fine = 1 - np.abs(_clouds(rng, chest.size, 44)) * 1.6
    coarse = 1 - np.abs(_clouds(rng, chest.size, 26)) * 1.6
    net = _clip(fine, 0, 1) * 0.6 + _clip(coarse, 0, 1)
    lines = _branches(rng, chest.size, 12, 0.8, 4.0)
    fill = _clip(around * patchy * (0.68 * strength), 0, 0.9)
    wide = _clip(around * 1.5, 0, 1)
    return _Lesion(fill, wide * strength * (0.09 * net + 0.10 * lines))


def _lesion(rng: np.random.Generator, kind: Kind, chest: _Chest) -> _Lesion:
    if kind == "bacteria":
        return _consolidation(rng, chest)
    if kind == "virus":
        return _interstitial(rng, chest)
    nothing = np.zeros_like(chest.air)
    return _Lesion(nothing, nothing)


def _attenuation(rng: np.random.Generator, chest: _Chest, lesion: _Lesion) -> Gray:
    """Return the sum of all shadows, [size, size], about 0 for air and 1 for the densest bone."""
    # Inspiration and rotation of the trunk change how dark healthy lungs are, overall and left against right.
    dark = rng.uniform(0.30, 0.42) + rng.normal(0, 0.03) * chest.x
    lungs = chest.air * (1 - lesion.fill)
    markings = lungs * _markings(rng, chest) + chest.air * lesion.streaks
    tissue = _body(chest) + _abdomen(rng, chest) + 0.10 * chest.heart
    mottle = 0.018 * _clouds(rng, chest.size, 14) * (tissue > 0.05)
    return tissue - dark * lungs + markings + _spine(chest) + _ribs(chest) + _shoulders(chest) + mottle


def _pose(rng: np.random.Generator, shadow: Gray) -> Gray:
    """Return the shadow rotated, shifted and scaled to a random pose on the film, [size, size]."""
    size = shadow.shape[0]
    angle, scale = rng.normal(0, 0.035), rng.uniform(0.90, 1.06) / _FIELD
    cos, sin, middle = math.cos(angle) * scale, math.sin(angle) * scale, size / 2
    dx, dy = rng.normal(0, 0.025) * size, rng.normal(0, 0.025) * size
    data = (cos, -sin, middle * (1 - cos + sin) + dx, sin, cos, middle * (1 - cos - sin) + dy)
    flat = Image.fromarray(shadow).transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return np.asarray(flat, dtype=np.float32)


def _expose(rng: np.random.Generator, shadow: Gray, contrast: float) -> Gray:
    """Return the film's brightness, about 0 to 1: exposure, uneven field, blur and grain."""
    size = shadow.shape[0]
    x, y = _grid(size)
    field = rng.normal(0, 0.03) * x + rng.normal(0, 0.03) * y
    gain, offset = contrast * rng.uniform(0.85, 1.15), rng.normal(0.06, 0.05)
    film = _clip(shadow * gain * (1 + field) + offset, 0.005, 1.2)
    film = film ** rng.uniform(0.80, 1.25)
    grain = rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(0.012, 0.04)
    return _soften(film + grain, rng.uniform(0.08, 0.26))


def _label(rng: np.random.Generator, film: Image.Image) -> None:
    """Write a side marker or projection label near an edge of most films, independent of the class."""
    style, size = rng.random(), film.size[0]
    height, light = rng.uniform(0.05, 0.11), rng.integers(190, 256)
    u, v = rng.uniform(0.01, 0.08), rng.uniform(0.03, 0.5)
    if style < 0.35:
        return
    text, left = ("R", u) if style < 0.75 else ("L", 0.9 - u) if style < 0.9 else ("A-P", u)
    place = (left * size, (v if text != "A-P" else 0.02) * size)
    ImageDraw.Draw(film).text(place, text, fill=int(light), font=_font(max(6, round(height * size))))


def phantom(rng: np.random.Generator, kind: Kind, size: int = 224, anatomy: Anatomy | None = None) -> GrayBytes:
    """Draw one chest X-ray, uint8 of shape [size, size], 0 black (air) to 255 white (bone).

    `anatomy` is that of the patient, by default a random one. With generators in the same state, films of different
    kinds differ only in the pathology. Raises ValueError for a size below 32 pixels.
    """
    if size < MIN_SIZE:
        raise ValueError(f"size is {size}, but a phantom needs at least {MIN_SIZE} pixels")
    anatomy = anatomy or draw_anatomy(rng)
    # The lesion has a separate random stream, so that the kind does not affect later draws.
    own = np.random.default_rng(int(rng.integers(2**62)))
    chest = _chest(anatomy, rng.normal(0, 0.03), size)
    shadow = _pose(rng, _attenuation(rng, chest, _lesion(own, kind, chest)))
    film = _clip(_expose(rng, shadow, anatomy.contrast), 0, 1)
    picture = Image.fromarray((film * 255).astype(np.uint8))
    _label(rng, picture)
    return np.array(picture, dtype=np.uint8)


@dataclass(frozen=True)
class _Patient:
    """A patient in the data set: split, kind, and the names of the films without suffix."""

    split: str
    kind: Kind
    films: tuple[str, ...]


# Films per patient; a fixed cycle instead of random draws, so that the classes have nearly the same distribution.
_FILM_COUNTS = (1, 1, 2, 1, 3, 2, 1, 2, 4, 3)


def _film_counts(rng: np.random.Generator, patients: int) -> list[int]:
    counts = [_FILM_COUNTS[i % len(_FILM_COUNTS)] for i in range(patients)]
    return [counts[i] for i in rng.permutation(patients)]


def _val_counts(rng: np.random.Generator) -> list[int]:
    """Return films per patient that add up to `VAL_IMAGES`, the images of each class in the validation split."""
    counts: list[int] = []
    while (left := VAL_IMAGES - sum(counts)) > 0:
        counts.append(min(left, int(rng.choice(_FILM_COUNTS))))
    return counts


def _groups(rng: np.random.Generator, train_patients: int, test_patients: int) -> Iterator[tuple[str, Kind, list[int]]]:
    """Yield (split, kind, films per patient) for each split and kind."""
    for split, patients in (("train", train_patients), ("test", test_patients)):
        normal = max(1, round(NORMAL_SHARE[split] * patients))
        bacteria = max(1, round(BACTERIA_SHARE * (patients - normal)))
        yield split, "normal", _film_counts(rng, normal)
        yield split, "bacteria", _film_counts(rng, bacteria)
        yield split, "virus", _film_counts(rng, patients - normal - bacteria)
    yield "val", "normal", _val_counts(rng)
    ill = _val_counts(rng)
    cut = max(1, round(BACTERIA_SHARE * len(ill)))
    yield "val", "bacteria", ill[:cut]
    yield "val", "virus", ill[cut:]


def _normal_films(number: int, count: int) -> tuple[str, ...]:
    # The real data set has two series of normal films with separate number ranges.
    stem = f"IM-{115 + number:04d}" if number % 2 else f"NORMAL2-IM-{1427 + number:04d}"
    return tuple(f"{stem}-{film + 1:04d}" for film in range(count))


def _patients(seed: int, train_patients: int, test_patients: int) -> list[_Patient]:
    """Return all patients; numbering continues across splits, so no patient is in more than one."""
    patients: list[_Patient] = []
    seen = {"normal": 0, "bacteria": 0, "virus": 0}
    films = dict(seen)
    for split, kind, counts in _groups(np.random.default_rng(seed), train_patients, test_patients):
        for count in counts:
            seen[kind] += 1
            first = films[kind] + 1
            films[kind] += count
            ill = tuple(f"person{seen[kind]}_{kind}_{first + i}" for i in range(count))
            patients.append(_Patient(split, kind, _normal_films(seen[kind], count) if kind == "normal" else ill))
    return patients


def _write_patient(folder: Path, patient: _Patient, rng: np.random.Generator, size: int) -> None:
    anatomy = draw_anatomy(rng)
    target = folder / patient.split / ("NORMAL" if patient.kind == "normal" else "PNEUMONIA")
    target.mkdir(parents=True, exist_ok=True)
    for name in patient.films:
        film = Image.fromarray(phantom(rng, patient.kind, size, anatomy))
        film.save(target / f"{name}.jpeg", quality=JPEG_QUALITY)


def _is_written(folder: Path, parameters: dict[str, int]) -> bool:
    """Return whether `folder` contains the data set of these parameters; raise if it contains anything else."""
    if not folder.exists():
        return False
    marker = folder / MARKER
    if not marker.is_file():
        raise FileExistsError(f"{folder} exists but has no {MARKER}: it is not a synthetic data set")
    found = json.loads(marker.read_text())
    if found != parameters:
        raise ValueError(f"{folder} was written with {found}, not {parameters}; delete it or choose another folder")
    return True


def write_synthetic(
    root: Path, seed: int = 0, train_patients: int = 180, test_patients: int = 60, size: int = 224
) -> Path:
    """Write a data set of phantoms as `root/chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg`.

    Films are greyscale JPEGs of `size` pixels a side, about two per patient, named as in the Kaggle set. The folder is
    created atomically, and a second call with the same parameters only returns its path. Raises ValueError for fewer
    than 4 patients, or if the folder was written with other parameters, and FileExistsError if it is not a synthetic
    data set.
    """
    if min(train_patients, test_patients) < MIN_PATIENTS:
        raise ValueError(f"each of train and test needs at least {MIN_PATIENTS} patients")
    parameters = {"version": VERSION, "seed": seed, "size": size}
    parameters |= {"train_patients": train_patients, "test_patients": test_patients}
    target = root / "chest_xray"
    if _is_written(target, parameters):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".chest_xray-") as scratch:
        folder = Path(scratch) / target.name
        for number, patient in enumerate(_patients(seed, train_patients, test_patients)):
            _write_patient(folder, patient, np.random.default_rng((seed, number)), size)
        (folder / MARKER).write_text(json.dumps(parameters, indent=2) + "\n")
        _publish(folder, target, parameters)
    return target


def _publish(folder: Path, target: Path, parameters: dict[str, int]) -> None:
    """Move the finished folder into place, unless a concurrent call has already written the same one."""
    try:
        os.rename(folder, target)
    except OSError:
        if not _is_written(target, parameters):
            raise
