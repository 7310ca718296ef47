"""What a model could use instead of the lungs: cues of how an image was made, and differences between the splits.

A cue that tells the classes apart by itself is a shortcut (Geirhos et al. 2020, DeGrave et al. 2021): a network that is
shown it, if only as the aspect that squashing leaves behind, may learn it and not the disease.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from cxr.data.splits import CLASSES

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Folds = list[tuple[Ints, Ints]]
FOLDS = 5
LEAST = 20  # images of a class that a split must have to be told from another: with fewer, chance alone reaches 0.7
MOST = 1000  # images of a class taken from a split, at random; more would only take longer
HEADER = ["bytes per pixel", "width", "height", "aspect ratio", "colour mode", "JPEG quantisation", "ICC profile"]


def cue_table(root: Path, manifest: pd.DataFrame, images: npt.NDArray[np.uint8] | None = None) -> pd.DataFrame:
    """What tells how each image was made, in the manifest's order; only the files' headers are read.

    Columns: bytes per pixel, width and height (pixels), aspect ratio, colour mode (a number for each), JPEG
    quantisation (the mean step of the luminance table; missing for a PNG), ICC profile (0 or 1), and with `images`
    (uint8 [n, s, s], in the manifest's order) brightness (their mean, 0 to 255). A file that cannot be read has
    missing values.
    """
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(_read_header, (root / path for path in manifest["path"])))
    table = pd.DataFrame(rows, columns=HEADER)
    table["colour mode"] = pd.factorize(table["colour mode"], sort=True)[0]
    if images is not None:
        table["brightness"] = images.mean(axis=(1, 2), dtype=np.float64)
    return table.astype(np.float64)


def _read_header(path: Path) -> tuple[float, float, float, float, str, float, float]:
    try:
        with Image.open(path) as image:
            width, height = image.size
            steps = getattr(image, "quantization", {}).get(0)
            mean_step = float(np.mean(steps)) if steps else np.nan
            density = path.stat().st_size / (width * height)
            return density, width, height, width / height, image.mode, mean_step, float("icc_profile" in image.info)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # the audit names it among the corrupt
        return np.nan, np.nan, np.nan, np.nan, "", np.nan, np.nan


def separability(values: Floats, labels: Ints, groups: npt.ArrayLike) -> float:
    """How well one cue tells the classes apart: cross-validated AUC, 0.5 to 1; missing where it cannot be measured.

    `values` [n] may have missing ones, which count as a value; `labels` [n] are 0 or 1; no group of `groups` [n] is on
    both sides of one of the 5 folds. The model is a tree of 16 leaves on the ranks, so the cue's scale plays no part,
    and a cue that is high in one class and both lower and higher in the other counts. The tree finds the direction
    by itself, in each training fold; a mean below 0.5 is chance, and given as 0.5.
    """
    return _separate(values, labels, make_folds(labels, groups))


def separabilities(cues: pd.DataFrame, labels: Ints, groups: npt.ArrayLike) -> dict[str, float]:
    """`separability` of every column of `cues`, highest first."""
    folds = make_folds(labels, groups)
    found = {str(name): _separate(cues[name].to_numpy(np.float64), labels, folds) for name in cues}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _separate(values: Floats, labels: Ints, folds: Folds) -> float:
    ranks = np.where(np.isnan(values), -1, rankdata(np.nan_to_num(values, nan=np.inf), method="dense"))
    tree = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=max(1, len(ranks) // 100), random_state=0)
    return max(0.5, _mean_auc(tree, ranks[:, None], labels, folds)) if folds else np.nan


def make_folds(labels: Ints, groups: npt.ArrayLike) -> Folds:
    """(train, test) positions of up to 5 stratified folds, no group in two; none where a class has only one group."""
    names = pd.factorize(np.asarray(groups))[0]
    count = min(FOLDS, *(len(np.unique(names[labels == label])) for label in (0, 1)))
    if count < 2:
        return []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    folds = splitter.split(np.zeros(len(labels)), labels, names)
    return [(train, test) for train, test in folds if len(set(labels[train])) == len(set(labels[test])) == 2]


def _mean_auc(model: object, features: Floats, labels: Ints, folds: Folds) -> float:
    # The mean over folds: scores pooled over folds are biased below 0.5 when the cue says nothing.
    return float(np.mean([_fold_auc(model, features, labels, *fold) for fold in folds])) if folds else np.nan


def _fold_auc(model: object, features: Floats, labels: Ints, train: Ints, test: Ints) -> float:
    fitted = model.fit(features[train], labels[train])  # type: ignore[attr-defined]
    return float(roc_auc_score(labels[test], fitted.predict_proba(features[test])[:, 1]))


def shift(
    features: npt.NDArray[np.float32], splits: npt.ArrayLike, labels: Ints, groups: npt.ArrayLike
) -> dict[tuple[str, str], float]:
    """How well train is told from another split within a class: (split, class) -> AUC, about 0.5 when they are alike.

    `features` is [n, d], e.g. what an ImageNet network pools, one row for each of `splits`, `labels` (0 or 1) and
    `groups`, all [n]. A logistic regression on standardised features is cross-validated by groups, with at most 1000
    images a side (a classifier two-sample test, Lopez-Paz and Oquab 2017). Splits with fewer than 20 images of a class
    are left out. Raises ValueError where the lengths differ.
    """
    where, names = np.asarray(splits), np.asarray(groups)
    if not len(features) == len(where) == len(labels) == len(names):
        raise ValueError(f"{len(features)} rows of features for {len(where)} images")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    found = {}
    for split, label, rows in _comparisons(where, labels):
        other = (where[rows] != "train").astype(np.int64)
        found[split, CLASSES[label]] = _mean_auc(probe, features[rows], other, make_folds(other, names[rows]))
    return {pair: auc for pair, auc in found.items() if not np.isnan(auc)}


def _comparisons(splits: npt.NDArray[np.str_], labels: Ints) -> Iterator[tuple[str, int, Ints]]:
    """(other split, class, positions of train and of the other split) for all that have enough images."""
    rng = np.random.default_rng(0)
    for split, label in product(("val", "test"), range(len(CLASSES))):
        sides = [np.flatnonzero((splits == name) & (labels == label)) for name in ("train", split)]
        if min(len(side) for side in sides) >= LEAST:
            yield split, label, np.concatenate([rng.permutation(side)[:MOST] for side in sides])
