"""Classes, splits by patient, folds, and the fingerprint that names a data set with its split."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from cxr.errors import UserError

CLASSES = ("NORMAL", "PNEUMONIA")
CLASS_TO_INDEX = {name: index for index, name in enumerate(CLASSES)}
OFFICIAL = ("train", "val", "test")


def fingerprint(manifest: pd.DataFrame) -> str:
    """Twelve hex digits that name a data set and its split: which images, labels and splits, in no order."""
    lines = sorted(f"{d} {y} {s}" for d, y, s in manifest[["digest", "label", "split"]].itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def assign_splits(manifest: pd.DataFrame, val_split: str, val_fraction: float, seed: int) -> pd.DataFrame:
    """A copy with the column `split` (train, val, test).

    `official` takes the folders as they are. `grouped` pools train and val and holds out `val_fraction` of
    each class, whole groups at a time. The test split is never touched. Raises `UserError` when a class has
    no image left in a split.
    """
    table = manifest.copy()
    table["split"] = table["official"]
    if val_split == "grouped":
        pool = table.index[table["official"] != "test"]
        held = grouped_holdout(table.loc[pool, "group"], table.loc[pool, "label"], val_fraction, seed)
        table.loc[pool, "split"] = np.where(held, "val", "train")
    _require_both_classes(table, val_split)
    return table


def assign_fold(manifest: pd.DataFrame, number: int, folds: int, val_fraction: float, seed: int) -> pd.DataFrame:
    """The rows of train and val, with the column `split`: `fold` for part `number` (from 1) of `folds`, for the rest
    `train` and, for a share of `val_fraction`, `val`.

    Parts are stratified by class and keep groups whole (scikit-learn's `StratifiedGroupKFold`). No row of the test
    folder is left. Raises `UserError` when a class has no image in one of the three.
    """
    table = manifest[manifest["official"] != "test"].reset_index(drop=True)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    try:
        parts = [held for _, held in splitter.split(table, table["label"], table["group"])]
    except ValueError as error:
        raise UserError(f"--fold {number}/{folds}: {error}; use fewer folds or more data") from error
    table["split"] = "train"
    table.loc[parts[number - 1], "split"] = "fold"
    rest = table.index[table["split"] == "train"]
    held = grouped_holdout(table.loc[rest, "group"], table.loc[rest, "label"], val_fraction, seed)
    table.loc[rest, "split"] = np.where(held, "val", "train")
    _require_both_classes(table, f"grouped --fold {number}/{folds}", ("train", "val", "fold"))
    return table


def _require_both_classes(table: pd.DataFrame, val_split: str, splits: tuple[str, ...] = OFFICIAL) -> None:
    for split in splits:  # test too: the only images of a class may have been unreadable, and skipped
        for name, label in CLASS_TO_INDEX.items():
            if not ((table["split"] == split) & (table["label"] == label)).any():
                raise UserError(
                    f"--val-split {val_split}: leaves no {name} image in {split}; "
                    "use another --val-split, --val-fraction or more data"
                )


def grouped_holdout(groups: pd.Series, labels: pd.Series, fraction: float, seed: int) -> np.ndarray:
    """A boolean mask [n]: a held-out share near `fraction` of each class, no group on both sides.

    Groups are shuffled by `seed` within their majority class and taken until the class's share is nearest
    to `fraction`, at least one. A group never splits, so the share is off by at most half a group.
    """
    frame = pd.DataFrame({"group": groups.to_numpy(), "label": labels.to_numpy()})
    stats = frame.groupby("group")["label"].agg(["size", "mean"])  # sorted by group, whatever the order of rows
    rng = np.random.default_rng(seed)
    chosen: list[str] = []
    for positive in (False, True):
        sizes = stats.loc[(stats["mean"] >= 0.5) == positive, "size"]
        sizes = sizes.iloc[rng.permutation(len(sizes))]
        before = sizes.cumsum() - sizes
        take = before + sizes / 2 <= fraction * sizes.sum()
        take.iloc[:1] = True
        chosen.extend(sizes.index[take])
    return frame["group"].isin(chosen).to_numpy()
