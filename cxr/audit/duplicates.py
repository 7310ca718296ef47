"""Duplicate images: identical bytes, identical pixels, or modified copies (near duplicates).

X-rays of different patients look similar, so a perceptual hash only proposes candidate pairs. A pair is confirmed if
its fine detail (the image minus a local mean) correlates after one image is registered to the other. On the 5,856
Kaggle images the most similar pair of different images reaches 0.892; of 500 copies each, cropped by 3 to 5% at every
side and saved again at JPEG quality 40, the lowest reaches 0.95.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cxr.audit.hamming import HashIndex
from cxr.data.store import Images

UInt8 = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]
Groups = list[list[int]]
Pairs = npt.NDArray[Any]  # of `_PAIR`
SAME = 0.93  # minimum correlation of fine detail of a near duplicate
HASH_BITS = 8  # maximum Hamming distance, of 64 bits, of a candidate pair
CUTS = (0.0, 0.025, 0.045)  # fraction cropped from each side before hashing: a hash tolerates crops of up to 2% only
MIN_CORRELATION = 0.85  # minimum plain correlation, at 32 pixels a side, of a candidate pair
MIN_FIRST_STEP = 0.7  # minimum correlation of fine detail after one step of the fit; 1 in 200 copies is below
STEPS = 3
MAX_FITTED = 100_000  # most similar candidate pairs to fit; the Kaggle images give 17,246
_SIDE = 64  # side length in pixels at which images are fitted
_WINDOW = 9  # side length in pixels of the local mean
_EDGE = 4  # pixels at each side that are not compared, as a fit may extend past the frame
_CHUNK = 32  # small enough for the CPU cache
_DETAILED = 256 * _CHUNK  # pairs whose images' fine detail, of 16 kB each, is in memory at once
_COMPARED = 4096  # rows whose pixels are in memory as float32 at once
_TRANSFORMS = tuple(product(CUTS, (False, True)))  # (cut, mirrored); in every second one mirrored
_PAIR = np.dtype([("a", np.int64), ("b", np.int64), ("transform", np.int64), ("similarity", np.float32)])


def exact_duplicates(manifest: pd.DataFrame) -> Groups:
    """Row positions of files with identical bytes, by the column `digest`, in groups of two or more, in row order."""
    return _group(manifest["digest"])


def pixel_duplicates(images: Images) -> Groups:
    """Positions of images with identical pixels, in groups of two or more; `images` is [n, s, s]."""
    rows = range(len(images))
    return _group(hashlib.blake2b(images[row].tobytes(), digest_size=16).digest() for row in rows)


def _group(keys: Iterable[Hashable]) -> Groups:
    found: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return [group for group in found.values() if len(group) > 1]


def pairs_of(groups: Groups) -> list[tuple[int, int]]:
    """The first member of each group paired with every other member."""
    return [(group[0], other) for group in groups for other in group[1:]]


def mixed(groups: Iterable[Iterable[int]], values: pd.Series) -> Groups:
    """The groups of row positions that have more than one of `values` (labels, splits, patients)."""
    column = values.to_numpy()
    return [list(group) for group in groups if len({column[row] for row in group}) > 1]


def near_duplicates(images: Images) -> pd.DataFrame:
    """Pairs of images with different pixels, one of which is a modified copy of the other; `images` is uint8 [n, s, s].

    Columns: a, b (positions, a < b), correlation (of fine detail after registration, 0.93 to 1), how (`copy`,
    `mirrored`, `cropped`, `mirrored and cropped`). Finds copies that were saved again, mirrored, or cropped by up to
    about 6% at each side; misses most that were cropped by 5% at two adjacent sides only, as the hash does not tolerate
    the shift. Of images with identical pixels only the first is compared. The hash is phash (Zauner 2010) from the
    library imagehash; the registration is that of Lucas and Kanade (1981), with a shift and a scale for each axis.

    Takes 6.2 kB an image, and some 400 MB however many they are and however alike.
    """
    first = np.setdiff1d(np.arange(len(images)), [copy for _, copy in pairs_of(pixel_duplicates(images))])
    small = np.empty((len(first), _SIDE, _SIDE), np.uint8)
    for place, row in enumerate(first):
        small[place] = _shrink(images[row])
    pairs = _confirm(small, _candidates(small))
    ends = np.sort(first[pairs[["a", "b"]].to_numpy(np.int64)], axis=1)
    table = pairs.assign(a=ends[:, 0], b=ends[:, 1]).sort_values("correlation", ascending=False)
    table = table.drop_duplicates(["a", "b"]).sort_values(["a", "b"], ignore_index=True)
    return table[["a", "b", "correlation", "how"]]


def _shrink(image: UInt8) -> UInt8:
    return np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.uint8)


def _candidates(small: UInt8) -> pd.DataFrame:
    """Candidate pairs, with the transform of `a` most similar to `b`: a, b, cut (per side), mirrored and similarity."""
    whole = _views_of(small, 0.0, False)
    index = HashIndex(whole.hashes)
    best, found = np.empty(0, _PAIR), []
    for number, (cut, mirrored) in enumerate(_TRANSFORMS):
        views = _views_of(small, cut, mirrored) if number else whole
        for a, b in index.within(views.hashes, HASH_BITS):
            found.append(_similar(views, whole, a, b, number))
            if sum(map(len, found)) > MAX_FITTED:
                best, found = _most_similar([best, *found]), []
    best = _most_similar([best, *found])
    chosen = pd.DataFrame(_TRANSFORMS, columns=["cut", "mirrored"]).iloc[best["transform"]].reset_index(drop=True)
    return pd.DataFrame({"a": best["a"], "b": best["b"]}).join(chosen).assign(similarity=best["similarity"])


@dataclass(frozen=True, slots=True)
class _Views:
    """Images [n] under one transform: hashes [n]; pixels uint8 [n, 1024], their means and norms about these [n, 1].

    `positions` [n] says which images these are: all but uniform ones, which correlate with nothing.
    """

    positions: Positions
    hashes: npt.NDArray[np.uint64]
    pixels: UInt8
    means: npt.NDArray[np.float32]
    norms: npt.NDArray[np.float32]

    def unit(self, rows: Positions) -> npt.NDArray[np.float32]:
        """The pixels of some rows, with zero mean and unit norm."""
        return (self.pixels[rows] - self.means[rows]) / self.norms[rows]


def _views_of(small: UInt8, cut: float, mirrored: bool) -> _Views:
    """Images cropped by `cut` at each side and optionally mirrored."""
    import imagehash  # only if the audit is not cached

    box = (cut * _SIDE, cut * _SIDE, (1 - cut) * _SIDE, (1 - cut) * _SIDE)
    bits, pixels = np.empty((len(small), 64), bool), np.empty((len(small), 32 * 32), np.uint8)
    for row, image in enumerate(small[:, :, ::-1] if mirrored else small):
        view = Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS, box=box)
        bits[row], pixels[row] = imagehash.phash(view).hash.ravel(), np.asarray(view).ravel()
    means, norms = np.empty((2, len(small), 1), np.float32)
    for rows in _slices(len(small), _COMPARED):
        part = pixels[rows].astype(np.float32)
        means[rows] = part.mean(axis=1, keepdims=True)
        norms[rows] = np.linalg.norm(part - means[rows], axis=1, keepdims=True)
    varied = np.flatnonzero(norms)
    hashes = np.packbits(bits, axis=1).view(np.uint64)[varied, 0]
    return _Views(varied, hashes, pixels[varied], means[varied], norms[varied] + np.float32(1e-6))


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _similar(views: _Views, whole: _Views, a: Positions, b: Positions, transform: int) -> Pairs:
    """The pairs of rows `a` of views and `b` of whole images with similar pixels."""
    similarity = np.empty(len(a), np.float32)
    for part in _slices(len(a), _COMPARED):
        similarity[part] = np.einsum("ij,ij->i", views.unit(a[part]), whole.unit(b[part]))
    kept = similarity >= MIN_CORRELATION
    pairs = np.empty(int(kept.sum()), _PAIR)
    pairs["a"], pairs["b"] = views.positions[a[kept]], whole.positions[b[kept]]
    pairs["transform"], pairs["similarity"] = transform, similarity[kept]
    others: Pairs = pairs[pairs["a"] != pairs["b"]]
    return others


def _most_similar(parts: Sequence[Pairs]) -> Pairs:
    """The `MAX_FITTED` most similar pairs, the most similar first: of two images, mirrored or not, the best only.

    Which are kept does not depend on the order in which they are found: of equals the first transform wins.
    """
    pairs: Pairs = np.concatenate(parts)
    pairs = pairs[np.lexsort((pairs["b"], pairs["a"], pairs["transform"], -pairs["similarity"]))]
    ends = np.sort(np.stack([pairs["a"], pairs["b"]]), axis=0)
    mirrored = pairs["transform"] % 2
    again = pd.DataFrame({"low": ends[0], "high": ends[1], "mirrored": mirrored}).duplicated().to_numpy()
    best: Pairs = pairs[~again][:MAX_FITTED]
    return best


def _confirm(small: UInt8, pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs whose correlation after the fit is at least `SAME`, with the columns correlation and how."""
    results = [torch.zeros(0, 2)]
    for rows in _slices(len(pairs), _DETAILED):
        part = pairs.iloc[rows]
        images, places = np.unique(part[["a", "b"]].to_numpy(np.int64), return_inverse=True)
        detail = torch.empty(len(images), _SIDE, _SIDE)
        for some in _slices(len(images), _CHUNK):
            detail[some] = _detail(small[images[some]])
        ends = torch.from_numpy(places.reshape(-1, 2))
        results += [_fit_some(detail, ends[some], part.iloc[some]) for some in _slices(len(part), _CHUNK)]
    correlation, scale = torch.cat(results).numpy().astype(np.float64).T
    kinds = np.where(scale < 0.985, "cropped", "copy")
    how = np.where(pairs["mirrored"].to_numpy(bool), np.where(scale < 0.985, "mirrored and cropped", "mirrored"), kinds)
    table: pd.DataFrame = pairs.assign(correlation=correlation, how=how)[correlation >= SAME]
    return table


def _fit_some(detail: Tensor, ends: Tensor, pairs: pd.DataFrame) -> Tensor:
    """The `_fit` of pairs [n], their two images being at `ends` [n, 2] in `detail` [m, s, s]."""
    moving, fixed = detail[ends[:, 0]], detail[ends[:, 1]]
    mirrored = torch.tensor(pairs["mirrored"].to_numpy(bool))[:, None, None]
    cuts = torch.tensor(pairs["cut"].to_numpy(np.float32))
    return _fit(torch.where(mirrored, moving.flip(2), moving), fixed, cuts)


def _detail(small: UInt8) -> Tensor:
    """Fine detail: float32 [n, s, s], the images minus a local mean (a box filter applied twice)."""
    images = torch.tensor(small)[:, None].float()
    blurred = images
    for _ in range(2):
        blurred = F.avg_pool2d(blurred, _WINDOW, 1, _WINDOW // 2, count_include_pad=False)
    return (images - blurred)[:, 0]


def _fit(moving: Tensor, fixed: Tensor, cuts: Tensor) -> Tensor:
    """Register each `moving` image to its `fixed` one, both [n, s, s]: [n, 2] of correlation and the smaller scale.

    The fit starts from a crop of `cuts` [n] at each side. Pairs with a low correlation after one step get 0.
    """
    scale = 1 - 2 * cuts
    place = torch.stack([scale, 0 * scale, scale, 0 * scale], dim=1)
    place, correlation = _improve(moving, fixed, place), torch.zeros(len(cuts))
    kept = _correlate(_warp(moving, place), fixed) >= MIN_FIRST_STEP
    if kept.any():
        moving, fixed, best = moving[kept], fixed[kept], place[kept]
        for _ in range(STEPS - 1):
            best = _improve(moving, fixed, best)
        correlation[kept], place[kept] = _correlate(_warp(moving, best), fixed), best
    return torch.stack([correlation, place[:, ::2].amin(dim=1)], dim=1)


def _warp(images: Tensor, place: Tensor) -> Tensor:
    """Images [n, s, s] resampled by `place` [n, 4]: scale and shift in x, then in y, in half image widths."""
    zero = torch.zeros(len(place))
    rows = [place[:, 0], zero, place[:, 1], zero, place[:, 2], place[:, 3]]
    grid = F.affine_grid(
        torch.stack(rows, dim=1).view(-1, 2, 3), [len(images), 1, *images.shape[1:]], align_corners=False
    )
    return F.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def _inside(images: Tensor) -> Tensor:
    """Images [..., s, s] without their edges, flattened."""
    return images[..., _EDGE:-_EDGE, _EDGE:-_EDGE].flatten(-2)


def _level(images: Tensor) -> Tensor:
    """Images [n, s, s] without their edges, flattened, with zero mean."""
    flat = _inside(images)
    return flat - flat.mean(dim=1, keepdim=True)


def _correlate(one: Tensor, other: Tensor) -> Tensor:
    return F.cosine_similarity(_level(one), _level(other), dim=1)


def _improve(moving: Tensor, fixed: Tensor, place: Tensor) -> Tensor:
    """One Gauss-Newton step of `place` [n, 4] towards matching images, after matching their contrast."""
    seen = _warp(moving, place)
    axis = (torch.arange(_SIDE) + 0.5) / _SIDE * 2 - 1
    down, across = torch.gradient(seen, spacing=2 / _SIDE, dim=(1, 2))
    across, down = across / place[:, 0, None, None], down / place[:, 2, None, None]
    slopes = _inside(torch.stack([across * axis, across, down * axis[:, None], down], dim=1))
    target, now = _level(fixed), _level(seen)
    target = target * (now.norm(dim=1, keepdim=True) / (target.norm(dim=1, keepdim=True) + 1e-6))
    normal = slopes @ slopes.transpose(1, 2)
    damped = normal + torch.diag_embed(1e-3 * normal.diagonal(dim1=1, dim2=2) + 1e-6)
    step: Tensor = torch.linalg.solve(damped, slopes @ (target - now)[:, :, None])[:, :, 0]
    low, high = torch.tensor([0.84, -0.1, 0.84, -0.1]), torch.tensor([1.05, 0.1, 1.05, 0.1])
    return (place + step.clamp(-0.05, 0.05)).clamp(low, high)
