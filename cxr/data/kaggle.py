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

import pandas as pd

from cxr.data.splits import CLASS_TO_INDEX, CLASSES, OFFICIAL
from cxr.errors import UserError

SUFFIXES = {".jpeg", ".jpg", ".png"}
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
