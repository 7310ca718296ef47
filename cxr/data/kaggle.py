"""Indexes a folder in the Kaggle layout -> the manifest: one row per image, with its patient group and split.

Patients are known only from file names: `person12_bacteria_34` and `person12_virus_35` come from two separate counters
(808 of 1,635 numbers in the training split occur in both), so the group is the number together with the subtype.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from cxr.data import dicom
from cxr.data.memory import UNREADABLE, Memory, StrPath, files_in
from cxr.data.splits import OFFICIAL
from cxr.errors import UserError
from cxr.task import KAGGLE, Task

SUFFIXES = {".jpeg", ".jpg", ".png"} | dicom.SUFFIXES
_ENDINGS = tuple(SUFFIXES)
UNLABELLED = "unlabelled"
COLUMNS = ["path", "label", "official", "group", "subtype"]
_PNEUMONIA = re.compile(r"(person\d+)_(bacteria|virus)_\d+", re.IGNORECASE)
_NORMAL = re.compile(r"((?:NORMAL2-)?IM-\d+)-\d+", re.IGNORECASE)


def find_root(data_dir: str | Path) -> Path:
    """The folder that contains `train/`: `data_dir` itself, or `chest_xray` nested once or twice in it.

    The Kaggle archive contains `chest_xray/chest_xray`. Raises `UserError` if there is no such folder.
    """
    try:
        top = Path(data_dir).expanduser().absolute()
        if not top.is_dir():
            raise UserError(f"--data-dir {top}: no such folder; pass the absolute path of the Kaggle folder")
        for candidate in (top, top / "chest_xray", top / "chest_xray" / "chest_xray"):
            if (candidate / "train").is_dir():
                return candidate
    except (OSError, RuntimeError) as error:  # no permission, name too long, unknown `~user`
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--data-dir {data_dir}: cannot be read ({reason}); pass the absolute path of the folder"
        ) from error
    raise UserError(f"--data-dir {top}: contains no train/ folder (nor does chest_xray/ in it)")


def parse_name(path: str) -> tuple[str, str]:
    """(group, subtype) from a file name; a name of unknown pattern is a separate group with subtype `unknown`."""
    name = path.rpartition("/")[2]
    if match := _PNEUMONIA.match(name):
        return f"{match[1]}_{match[2]}".lower(), match[2].lower()
    if match := _NORMAL.match(name):
        return match[1].upper(), "normal"
    return path, "unknown"


def index_folder(root: Path, task: Task = KAGGLE, memory: Memory | None = None) -> pd.DataFrame:
    """The manifest of `root/{train,val,test}/CLASS`, sorted by path; files that the `memory` knows are not read.

    Columns: path (relative, posix), label (of the task), official (split by folder), group, subtype, digest (sha256 of
    the bytes, or `unreadable:` and the path). Raises `UserError` for a folder without every class in train and test.
    """
    rows = [row for split in OFFICIAL for row in list_classes(root, split, task)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    for split in ("train", "test"):
        for name, label in task.class_to_index.items():
            if not ((table["official"] == split) & (table["label"] == label)).any():
                raise UserError(
                    f"{root / split / name}: contains no .jpeg, .jpg, .png or DICOM file; every class is required"
                )
    table["digest"] = digest_files(files_in(root, table["path"]), memory)
    return table


def index_for_evaluation(
    data_dir: str | Path, task: Task = KAGGLE, memory: Memory | None = None
) -> tuple[Path, pd.DataFrame, str]:
    """(root, manifest, split) of images to evaluate on: the `test` split of a folder in the Kaggle layout, all images
    of a folder of class folders, as split `external`, or the files of a folder without subfolders, as split
    `unlabelled`, whose label is -1.

    Raises `UserError` for a folder that lacks a class, or without images.
    """
    try:
        top = Path(data_dir).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"--data-dir {data_dir}: {error}; pass the absolute path of the folder") from error
    files = [path for path in _visible(top) if is_image(path)]
    if files and not any(path.is_dir() for path in _visible(top)):
        rows = [(path.name, -1, UNLABELLED, *parse_name(path.name)) for path in files]
        table = pd.DataFrame(rows, columns=COLUMNS)
        return top, table.assign(digest=digest_files(files, memory)), UNLABELLED
    if not any(_label(path.name, task) is not None for path in _visible(top)):
        root = find_root(top)
        table = index_folder(root, task, memory)
        return root, table[table["official"] == "test"].reset_index(drop=True), "test"
    table = pd.DataFrame(list_classes(top, ".", task), columns=COLUMNS).assign(official="external")
    if set(table["label"]) != set(task.class_to_index.values()):
        raise UserError(f"--data-dir {top}: needs images in each of {' and '.join(task.classes)}")
    table["digest"] = digest_files(files_in(top, table["path"]), memory)
    return top, table, "external"


def list_classes(root: Path, split: str, task: Task) -> list[tuple[str, int, str, str, str]]:
    """The rows (path, label, split, group, subtype) of the class folders in `root/split`.

    Raises `UserError` for a folder that is none of the task's classes.
    """
    rows, above = [], "" if split == "." else f"{split}/"
    for folder in _visible(root / split):
        label = _label(folder.name, task)
        if label is None:
            if not folder.is_dir():
                continue
            known = " and ".join(task.classes)
            raise UserError(
                f"{folder}: not a class folder; {split}/ may contain only {known}; for other classes, name all of them "
                "by --classes"
            )
        for name in _visible_names(folder):
            if name.lower().endswith(_ENDINGS) or is_image(folder / name):
                path = f"{above}{folder.name}/{name}"
                rows.append((path, label, split, *parse_name(path)))
    return rows


def is_image(file: Path) -> bool:
    """By its suffix; a file without one, or with a number (`1.2.840.113619`), is an image if it is DICOM."""
    suffix = file.suffix.lower()
    if suffix in SUFFIXES or not (suffix == "" or suffix[1:].isdigit()):
        return suffix in SUFFIXES
    try:
        return dicom.is_dicom(dicom.head_of(file))
    except OSError:  # a folder, or not readable
        return False


def _label(name: str, task: Task) -> int | None:
    """The label of a class folder; those of the Kaggle set may be written in any case."""
    return task.class_to_index.get(name.upper() if set(task.classes) == set(KAGGLE.classes) else name)


def folder_names(folder: Path) -> list[str]:
    """The names of the visible folders in a folder; none if it does not exist."""
    return [path.name for path in _visible(folder) if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    """The sorted entries of a folder, without hidden files and `__MACOSX`; none if it does not exist."""
    return [folder / name for name in _visible_names(folder)]


def _visible_names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith((".", "__MACOSX")))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error


def is_unreadable(digest: str) -> bool:
    """Whether the digest stands for a file that could not be read when it was indexed."""
    return digest.startswith(UNREADABLE)


def digest_files(paths: Iterable[StrPath], memory: Memory | None = None) -> list[str]:
    """The sha256 of each file's bytes, in order; `unreadable:` and the path for one that cannot be read."""
    return [facts.digest for facts in (memory or Memory()).facts(paths)]
