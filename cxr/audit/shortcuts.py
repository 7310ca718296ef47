"""Shortcuts (acquisition cues that predict the class) and distribution shift between the splits.

A cue that separates the classes by itself is a shortcut (Geirhos et al. 2020, DeGrave et al. 2021): a network that can
see it, if only as the distortion left by squashing, may learn it instead of the disease.
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

from cxr.data import dicom
from cxr.data.memory import files_in
from cxr.data.store import Images
from cxr.task import KAGGLE, Task

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Folds = list[tuple[Ints, Ints]]
FOLDS = 5
MIN_IMAGES = 20  # of a class in each split for a comparison: with fewer, an AUC of 0.7 arises by chance
MAX_IMAGES = 1000  # of a class sampled from each split; more would only take longer
HEADER = ["bytes per pixel", "width", "height", "aspect ratio", "colour mode", "JPEG quantisation", "ICC profile"]


def cue_table(root: Path, manifest: pd.DataFrame, images: Images | None = None) -> pd.DataFrame:
    """Acquisition cues of each image, in the order of the manifest; only the headers of the files are read.

    Columns: bytes per pixel, width and height (pixels), aspect ratio, colour mode (as an integer code), JPEG
    quantisation (the mean step of the luminance table; missing for a PNG), ICC profile (0 or 1), and with `images`
    (uint8 [n, s, s], in the manifest's order) brightness (their mean, 0 to 255). A file that cannot be read has
    missing values. Files are those in the column `file` of the manifest, if there is one, else `path` below `root`.
    """
    files = manifest["file"] if "file" in manifest else files_in(root, manifest["path"])
    with dicom.quiet(), ThreadPoolExecutor() as pool:
        rows = list(pool.map(_read_header, map(Path, files)))
    table = pd.DataFrame(rows, columns=HEADER)
    table["colour mode"] = pd.factorize(table["colour mode"], sort=True)[0]
    if images is not None:
        table["brightness"] = [images[row].mean(dtype=np.float64) for row in range(len(images))]
    return table.astype(np.float64)


def _read_header(path: Path) -> tuple[float, float, float, float, str, float, float]:
    try:
        if dicom.has_dicom_name(path) or dicom.is_dicom(dicom.head_of(path)):
            return _read_dicom(path)
        with Image.open(path) as image:
            width, height = image.size
            steps = getattr(image, "quantization", {}).get(0)
            mean_step = float(np.mean(steps)) if steps else np.nan
            density = path.stat().st_size / (width * height)
            return density, width, height, width / height, image.mode, mean_step, float("icc_profile" in image.info)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # the audit reports it as corrupt
        return np.nan, np.nan, np.nan, np.nan, "", np.nan, np.nan


def _read_dicom(path: Path) -> tuple[float, float, float, float, str, float, float]:
    header = dicom.read_header(path.read_bytes())
    width, height = header.width, header.height
    return path.stat().st_size / (width * height), width, height, width / height, header.mode, np.nan, 0.0


def separability(values: Floats, labels: Ints, groups: npt.ArrayLike) -> float:
    """How well one cue separates the classes: cross-validated AUC, 0.5 to 1; NaN if it cannot be computed.

    `values` [n] may be missing, which counts as a separate value; `labels` [n] count from 0, and of more than two the
    AUC is the mean over each against the rest; each of the 5 folds keeps the groups of `groups` [n] together. The model
    is a decision tree with 16 leaves on the ranks, so it is invariant to the scale of the cue and can use non-monotone
    relations. The tree learns the direction in each training fold; a mean below 0.5 is due to chance and returned as
    0.5.
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
    """(train, test) positions of up to 5 stratified folds by group; none if a class has only one group."""
    names = pd.factorize(np.asarray(groups))[0]
    every = range(max(1, int(labels.max(initial=0))) + 1)
    count = min(FOLDS, *(len(np.unique(names[labels == label])) for label in every))
    if count < 2:
        return []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    folds = splitter.split(np.zeros(len(labels)), labels, names)
    return [(train, test) for train, test in folds if len(set(labels[train])) == len(set(labels[test])) == len(every)]


def _mean_auc(model: object, features: Floats, labels: Ints, folds: Folds) -> float:
    # The mean over folds: the AUC of scores pooled over folds is biased below 0.5 for uninformative cues.
    return float(np.mean([_fold_auc(model, features, labels, *fold) for fold in folds])) if folds else np.nan


def _fold_auc(model: object, features: Floats, labels: Ints, train: Ints, test: Ints) -> float:
    fitted = model.fit(features[train], labels[train])  # type: ignore[attr-defined]
    found = fitted.predict_proba(features[test])
    return float(roc_auc_score(labels[test], found[:, 1] if found.shape[1] == 2 else found, multi_class="ovr"))


def shift(
    features: npt.NDArray[np.float32],
    splits: npt.ArrayLike,
    labels: Ints,
    groups: npt.ArrayLike,
    task: Task = KAGGLE,
) -> dict[tuple[str, str], float]:
    """How well a linear probe separates train from another split: (split, class) -> AUC, about 0.5 for no shift.

    Each class is probed by itself. `features` is [n, d], e.g. pooled features of an ImageNet network, one row for each
    of `splits`, `labels` (of the task) and `groups`, all [n]. A logistic regression on standardised features is
    cross-validated by groups, with at most 1000 images per split (a classifier two-sample test, Lopez-Paz and Oquab
    2017). Splits with fewer than 20 images of a class are left out. Raises ValueError if the lengths differ.
    """
    where, names = np.asarray(splits), np.asarray(groups)
    if not len(features) == len(where) == len(labels) == len(names):
        raise ValueError(f"{len(features)} rows of features for {len(where)} images")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    found = {}
    for split, label, rows in _comparisons(where, labels, len(task.classes)):
        other = (where[rows] != "train").astype(np.int64)
        found[split, task.classes[label]] = _mean_auc(probe, features[rows], other, make_folds(other, names[rows]))
    return {pair: auc for pair, auc in found.items() if not np.isnan(auc)}


def _comparisons(splits: npt.NDArray[np.str_], labels: Ints, classes: int) -> Iterator[tuple[str, int, Ints]]:
    """(other split, class, positions of train and of the other split) for all with enough images."""
    rng = np.random.default_rng(0)
    for split, label in product(("val", "test"), range(classes)):
        sides = [np.flatnonzero((splits == name) & (labels == label)) for name in ("train", split)]
        if min(len(side) for side in sides) >= MIN_IMAGES:
            yield split, label, np.concatenate([rng.permutation(side)[:MAX_IMAGES] for side in sides])
