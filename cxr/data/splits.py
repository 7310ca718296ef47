"""Classes, splits by patient, folds, and the fingerprint that identifies a data set and its split."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from cxr.data.depth import FULL
from cxr.errors import UserError
from cxr.task import KAGGLE, Task

OFFICIAL = ("train", "val", "test")


def fingerprint(manifest: pd.DataFrame, depth: int = FULL) -> str:
    """Twelve hex digits that identify a data set and its split: images, labels and splits, independent of the order,
    and the `depth` of 16-bit images if it is not 16 bits."""
    rows = zip(*(manifest[name].tolist() for name in ("digest", "label", "split")), strict=True)
    lines = sorted(f"{digest} {label} {split}" for digest, label, split in rows)
    lines += [f"depth {depth}"] * (depth != FULL)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def assign_splits(
    manifest: pd.DataFrame, val_split: str, val_fraction: float, seed: int, task: Task = KAGGLE
) -> pd.DataFrame:
    """A copy with the column `split` (train, val, test).

    `official` keeps the split of the folders. `grouped` pools train and val and holds out `val_fraction` of each class,
    by group. The test split never changes. Raises `UserError` if a split has no image of a class of the task.
    """
    table = manifest.copy()
    table["split"] = table["official"]
    if val_split == "grouped":
        pool = table.index[table["official"] != "test"]
        held = grouped_holdout(table.loc[pool, "group"], table.loc[pool, "label"], val_fraction, seed)
        table.loc[pool, "split"] = np.where(held, "val", "train")
    require_every_class(table, f"--val-split {val_split}", task)
    return table


def assign_fold(
    manifest: pd.DataFrame, fold: tuple[int, int], val_fraction: float, seed: int, task: Task = KAGGLE
) -> pd.DataFrame:
    """The rows of train and val, with the column `split`: `fold` for `fold` = (number, from 1; how many), and of the
    rest `val` for a fraction `val_fraction` and `train` otherwise.

    Folds are stratified by class and keep groups together (scikit-learn's `StratifiedGroupKFold`). Rows of the test
    folder are dropped. Raises `UserError` if one of the three has no image of a class.
    """
    number, folds = fold
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
    require_every_class(table, f"--val-split grouped --fold {number}/{folds}", task, ("train", "val", "fold"))
    return table


def patients_across(groups: pd.Series, splits: pd.Series) -> list[str]:
    """The groups with images in more than one split, sorted."""
    counts = splits.groupby(groups).nunique()
    return sorted(counts.index[counts > 1])


def require_every_class(table: pd.DataFrame, option: str, task: Task, splits: tuple[str, ...] = OFFICIAL) -> None:
    """Raise `UserError`, naming the option that made the splits, if one of them has no image of a class."""
    for split in splits:  # also test: all images of a class may have been skipped as unreadable
        for name, label in task.class_to_index.items():
            if not ((table["split"] == split) & (table["label"] == label)).any():
                raise UserError(
                    f"{option}: leaves no {name} image in {split}; "
                    "use a different --val-split or --val-fraction, or more data"
                )


def grouped_holdout(groups: pd.Series, labels: pd.Series, fraction: float, seed: int) -> np.ndarray:
    """A boolean mask [n] of the held-out images: about `fraction` of each class, by group.

    Groups are shuffled by `seed` within their majority class (of equals, the higher label) and held out until the
    fraction of the class is nearest to `fraction`, at least one group. Groups are kept together, so the fraction is off
    by at most half a group.
    """
    frame = pd.DataFrame({"group": groups.to_numpy(), "label": labels.to_numpy()})
    counts = pd.crosstab(frame["group"], frame["label"])  # sorted by group, independent of the row order
    majority = counts[counts.columns[::-1]].idxmax(axis=1)
    rng = np.random.default_rng(seed)
    chosen: list[str] = []
    for label in counts.columns:
        sizes = counts.sum(axis=1)[majority == label]
        sizes = sizes.iloc[rng.permutation(len(sizes))]
        before = sizes.cumsum() - sizes
        take = before + sizes / 2 <= fraction * sizes.sum()
        take.iloc[:1] = True
        chosen.extend(sizes.index[take])
    return frame["group"].isin(chosen).to_numpy()
