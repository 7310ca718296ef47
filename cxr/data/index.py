"""A Kaggle-shaped folder -> the manifest: one row for each image, with its patient group and split.

The patient is known only as far as file names tell: `person12_bacteria_34` and `person12_virus_35` come from
two separate counters (808 of 1,635 numbers of the training split carry both), so number and subtype
together make the group.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from cxr.errors import UserError

CLASSES = ("NORMAL", "PNEUMONIA")
CLASS_TO_INDEX = {name: index for index, name in enumerate(CLASSES)}
SUFFIXES = {".jpeg", ".jpg", ".png"}
OFFICIAL = ("train", "val", "test")
COLUMNS = ["path", "label", "official", "group", "subtype"]
UNREADABLE = "unreadable:"  # starts the digest of a file that cannot be read
_PNEUMONIA = re.compile(r"(person\d+)_(bacteria|virus)_\d+", re.IGNORECASE)
_NORMAL = re.compile(r"((?:NORMAL2-)?IM-\d+)-\d+", re.IGNORECASE)


def find_root(data_dir: str | Path) -> Path:
    """The folder that holds `train/`: `data_dir` itself or the once or twice nested `chest_xray` in it.

    The Kaggle zip holds `chest_xray/chest_xray`. Raises `UserError` when there is none.
    """
    try:
        top = Path(data_dir).expanduser().absolute()
        if not top.is_dir():
            raise UserError(f"--data-dir {top}: no such folder; give an absolute path to the Kaggle folder")
        for candidate in (top, top / "chest_xray", top / "chest_xray" / "chest_xray"):
            if (candidate / "train").is_dir():
                return candidate
    except (OSError, RuntimeError) as error:  # no permission, too long a name; a `~user` there is not
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--data-dir {data_dir}: cannot be read ({reason}); give the folder's absolute path") from error
    raise UserError(f"--data-dir {top}: holds no train/ folder (nor does chest_xray/ in it)")


def parse_name(path: str) -> tuple[str, str]:
    """(group, subtype) told by a file's name; a name of no known pattern is a group of its own, `unknown`."""
    stem = Path(path).stem
    if match := _PNEUMONIA.match(stem):
        return f"{match[1]}_{match[2]}".lower(), match[2].lower()
    if match := _NORMAL.match(stem):
        return match[1].upper(), "normal"
    return path, "unknown"


def index_folder(root: Path) -> pd.DataFrame:
    """The manifest of `root/{train,val,test}/{NORMAL,PNEUMONIA}`, sorted by path.

    Columns: path (relative, posix), label (0 NORMAL, 1 PNEUMONIA), official (split by folder), group, subtype,
    digest (sha256 of the bytes, or `unreadable:` and the path). Raises `UserError` for a folder
    without both classes in train and test.
    """
    rows = [row for split in OFFICIAL for row in _index_split(root, split)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    for split in ("train", "test"):
        for name, label in CLASS_TO_INDEX.items():
            if not ((table["official"] == split) & (table["label"] == label)).any():
                raise UserError(f"{root / split / name}: holds no .jpeg, .jpg or .png; both classes are needed there")
    table["digest"] = digest_files(root / path for path in table["path"])
    return table


def index_for_evaluation(data_dir: str | Path) -> tuple[Path, pd.DataFrame, str]:
    """(root, manifest, split) of images to evaluate on: the `test` split of a Kaggle-shaped folder, or all of a
    flat folder with `NORMAL/` and `PNEUMONIA/`, which is then called `external`.

    Raises `UserError` for a folder without both classes.
    """
    try:
        top = Path(data_dir).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"--data-dir {data_dir}: {error}; give the folder's absolute path") from error
    if not any(path.name.upper() in CLASS_TO_INDEX for path in _visible(top)):
        root = find_root(top)
        table = index_folder(root)
        return root, table[table["official"] == "test"].reset_index(drop=True), "test"
    table = pd.DataFrame(_index_split(top, "."), columns=COLUMNS).assign(official="external")
    if set(table["label"]) != set(CLASS_TO_INDEX.values()):
        raise UserError(f"--data-dir {top}: needs images in both {' and '.join(CLASSES)}")
    table["digest"] = digest_files(top / path for path in table["path"])
    return top, table, "external"


def _index_split(root: Path, split: str) -> list[tuple[str, int, str, str, str]]:
    rows = []
    for folder in _visible(root / split):
        name = folder.name.upper()
        if name not in CLASS_TO_INDEX:
            if not folder.is_dir():
                continue
            raise UserError(f"{folder}: not a class folder; {split}/ may hold {' and '.join(CLASSES)} only")
        for file in _visible(folder):
            if file.suffix.lower() in SUFFIXES:
                path = file.relative_to(root).as_posix()
                rows.append((path, CLASS_TO_INDEX[name], split, *parse_name(path)))
    return rows


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, less `.DS_Store`, `._*` and `__MACOSX`; nothing if it does not exist."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error


def digest_files(paths: Iterable[Path]) -> list[str]:
    """The sha256 of each file's bytes, in order; `unreadable:` and the path for one that cannot be read."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_digest_file, paths))


def _digest_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return f"{UNREADABLE}{path}"


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
