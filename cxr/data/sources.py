"""Where images come from: folders of class folders, and lists (CSV, TSV, JSON), all read into the same table.

The columns are path (relative to the root, posix), label, official (the split that the source names, or that is made
here), group (the patient), subtype and digest. The rows are in the order of the splits, then of the paths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from cxr.config import TrainConfig
from cxr.data.headers import with_patients
from cxr.data.kaggle import (
    COLUMNS,
    digest_files,
    find_root,
    folder_names,
    index_folder,
    index_for_evaluation,
    list_classes,
    parse_name,
)
from cxr.data.lists import find_list, read_list
from cxr.data.splits import OFFICIAL, grouped_holdout
from cxr.errors import UserError
from cxr.storage import Cache
from cxr.task import KAGGLE, SUBTYPES, Task


@dataclass(frozen=True, slots=True)
class Source:
    """What was found: the folder that paths are relative to, the table, the task, and remarks for people."""

    root: Path
    table: pd.DataFrame
    task: Task
    remarks: tuple[str, ...] = ()


def read_source(config: TrainConfig, folder: str | Path) -> Source:
    """The images that `data_dir` names, `folder` in its place for phantoms.

    Raises `UserError` for what is no source, or has classes, patients or splits that cannot be used.
    """
    listed = find_list(folder)
    found = _from_list(listed, config) if listed else _from_folder(folder, config)
    if config.labels == "subtype":
        found = _by_subtype(found, config)
    found = _with_patients(found, config.patient_pattern)
    table = with_patients(found.root, found.table, lambda: Cache.open(config.cache_dir).patient_key())
    found = replace(found, table=table)
    return with_test(found, config)


def to_evaluate(data_dir: str | Path, task: Task) -> tuple[Path, pd.DataFrame, str]:
    """(root, table, split) of images to evaluate a model of this task on: a list's test split, or all of its images as
    split `external`; or what `index_for_evaluation` finds in a folder.

    Raises `UserError` for labels that the task does not have, and classes without an image.
    """
    file = find_list(data_dir)
    if file is None:
        return index_for_evaluation(data_dir, task)
    table = read_list(file)
    if strange := sorted(set(table["class"]) - set(task.classes)):
        raise UserError(
            f"{file}: labels {', '.join(strange)} unknown to the model, which has {', '.join(task.classes)}"
        )
    table, split = _labelled(file, table, task), "external"
    if (table["official"] == "test").any():
        table, split = table[table["official"] == "test"].reset_index(drop=True), "test"
    if missing := set(range(len(task.classes))) - set(table["label"]):
        raise UserError(
            f"{file}: has no {' and no '.join(task.classes[label] for label in missing)} image to evaluate on"
        )
    return file.parent, table, split


def _from_list(file: Path, config: TrainConfig) -> Source:
    """The rows of a list; its labels are names."""
    table = read_list(file, config.columns)
    task = Task.of(table["class"], config.classes, config.positive)
    return Source(file.parent, _labelled(file, table, task), task, (f"list {file.name}",))


def _labelled(file: Path, table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The rows of a list as a table, with patients and subtypes from file names where it has none."""
    table["label"] = table["class"].map(task.class_to_index)
    parsed = [parse_name(path) for path in table["path"]]
    blank = table["subtype"] == ""
    table.loc[blank, "subtype"] = pd.Series([subtype for _, subtype in parsed], table.index)[blank]
    table["group"] = [own or group for own, (group, _) in zip(table["group"], parsed, strict=True)]
    table = _in_order(table[COLUMNS])
    return table.assign(digest=digest_files(file.parent / path for path in table["path"]))


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    order = {name: index for index, name in enumerate(OFFICIAL)}
    rows = zip(table["official"], table["path"], strict=True)
    keys = [(order.get(split, -1), PurePosixPath(path)) for split, path in rows]
    return table.iloc[sorted(range(len(table)), key=keys.__getitem__)].reset_index(drop=True)


def _from_folder(folder: str | Path, config: TrainConfig) -> Source:
    """Class folders with `train/` above them, or none."""
    top = Path(folder).expanduser()
    flat = top.is_dir() and "train" not in folder_names(top) and _flat_names(top)
    root = top.absolute() if flat else find_root(folder)
    names = _flat_names(root) if flat else sorted({name for split in OFFICIAL for name in folder_names(root / split)})
    task = _task_of_folders(root, names, config)
    if not flat:
        return Source(root, index_folder(root, task), task)
    table = pd.DataFrame(list_classes(root, ".", task), columns=COLUMNS).assign(official="")
    for name, label in task.class_to_index.items():
        if not (table["label"] == label).any():
            raise UserError(f"{root / name}: contains no image; every class is required")
    return Source(root, table.assign(digest=digest_files(root / path for path in table["path"])), task)


def _flat_names(top: Path) -> list[str]:
    """The names of the class folders directly in a folder; none where `chest_xray/` lies in it."""
    names = folder_names(top)
    return [] if "chest_xray" in names else names


def _task_of_folders(root: Path, names: list[str], config: TrainConfig) -> Task:
    """The task of class folders with these names; any name of the Kaggle set means that set."""
    if config.classes == "auto" and (not names or {name.upper() for name in names} & set(KAGGLE.classes)):
        return Task.of(KAGGLE.classes, positive=config.positive)
    spelled = pd.Series(names).groupby([name.casefold() for name in names]).agg(list)
    if twice := [spellings for spellings in spelled if len(spellings) > 1]:
        raise UserError(f"{root}: class folders {' and '.join(twice[0])} differ in case only; rename one of them")
    return Task.of(names, config.classes, config.positive)


def _by_subtype(found: Source, config: TrainConfig) -> Source:
    """The same images, classified by their subtypes; one without a subtype keeps the name of its class."""
    table, names = found.table.copy(), pd.Series(found.task.classes)
    own = names[table["label"]].reset_index(drop=True)
    kinds = table["subtype"].where(table["subtype"] != "unknown", own)
    if found.task == KAGGLE:
        kinds = kinds.str.upper()
    if found.task == KAGGLE and set(kinds) - set(SUBTYPES.classes):
        wrong = table.loc[~kinds.isin(SUBTYPES.classes), "path"]
        raise UserError(
            f"--labels subtype: {some(wrong)} without bacteria, virus or normal in the name; use --labels class"
        )
    own_order = set(kinds) == set(SUBTYPES.classes) and config.classes == "auto"
    task = SUBTYPES if own_order else Task.of(kinds, config.classes, config.positive)
    return replace(found, table=table.assign(label=kinds.map(task.class_to_index)), task=task)


def _with_patients(found: Source, pattern: str) -> Source:
    """Groups by the pattern, where one is given, and a remark about where the patients come from."""
    table = found.table
    own = int((table["group"] == table["path"]).sum())
    if pattern != "auto":
        table = table.assign(group=_matched(table["path"], table["group"], pattern))
        unmatched = int((table["group"] == table["path"]).sum())
        remark = f"patients: by --patient-pattern, {unmatched} of {len(table)} images without a match are their own"
    elif own:
        remark = (
            f"patients: unknown for {own} of {len(table)} images, each of which counts as a patient of its own; see "
            "--patient-pattern"
        )
    else:
        return found
    return replace(found, table=table, remarks=(*found.remarks, remark))


def _matched(paths: pd.Series, groups: pd.Series, pattern: str) -> list[str]:
    """The patient that the pattern finds in each path that has no patient yet (its group is the path)."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--patient-pattern {pattern}: not a regular expression ({error})") from error
    if expression.groups != 1:
        raise UserError(f"--patient-pattern {pattern}: has {expression.groups} groups in parentheses; it needs one")
    matches = [expression.search(path) for path in paths]
    if not any(matches):
        raise UserError(f"--patient-pattern {pattern}: matches no path, such as {paths.iloc[0]}")
    return [match[1] if match and match[1] else group for match, group in zip(matches, groups, strict=True)]


def with_test(found: Source, config: TrainConfig) -> Source:
    """Splits from a file, or a test split made where the source has none."""
    if config.splits != "auto":
        return replace(found, table=_given_splits(found.table, Path(config.splits).expanduser()))
    if (found.table["official"] == "test").any():
        return found
    table = found.table.copy()
    held = grouped_holdout(table["group"], table["label"], config.test_fraction, config.split_seed)
    table["official"] = np.where(held, "test", table["official"].replace("", "train"))
    remark = f"test split: made here, {held.sum()} of {len(table)} images by patient (--test-fraction, --split-seed)"
    return replace(found, table=_in_order(table), remarks=(*found.remarks, remark))


def _given_splits(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """The table with the splits that a file gives, by digest."""
    try:
        given = pd.read_csv(file, dtype=str)[["digest", "split"]]
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or "it needs the columns digest and split"
        raise UserError(f"--splits {file}: cannot be read ({reason})") from error
    splits = table["digest"].map(given.drop_duplicates("digest").set_index("digest")["split"])
    if strange := sorted(set(given["split"].dropna()) - set(OFFICIAL)):
        raise UserError(f"--splits {file}: {', '.join(strange)} is not a split; use train, val and test")
    if splits.isna().any():
        missing = table.loc[splits.isna(), "path"]
        raise UserError(f"--splits {file}: has no split for {some(missing)}; it was made for other images")
    return _in_order(table.assign(official=splits))


def some(paths: pd.Series) -> str:
    """How many, and the first three."""
    return f"{len(paths)} image(s) ({', '.join(map(str, paths[:3]))}{', …' if len(paths) > 3 else ''})"
