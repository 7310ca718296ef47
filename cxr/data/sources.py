"""Where images come from: folders of class folders, and lists (CSV, TSV, JSON), all read into the same table.

The columns are path (relative to the root, posix), label, official (the split that the source names, or that is made
here), group (the patient), subtype and digest. The rows are in the order of the splits, then of the paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cxr.config import TrainConfig
from cxr.data.headers import with_patients
from cxr.data.kaggle import (
    COLUMNS,
    UNLABELLED,
    digest_files,
    find_root,
    folder_names,
    index_folder,
    index_for_evaluation,
    list_classes,
    parse_name,
)
from cxr.data.lists import find_list, read_list
from cxr.data.memory import Memory, files_in
from cxr.data.splits import OFFICIAL, grouped_holdout, patients_across, require_every_class
from cxr.errors import UserError
from cxr.storage import Cache
from cxr.task import KAGGLE, SUBTYPES, Task, differ_in_case


@dataclass(frozen=True, slots=True)
class Source:
    """What was found: the folder that paths are relative to, the table, the task, and remarks for people."""

    root: Path
    table: pd.DataFrame
    task: Task
    remarks: tuple[str, ...] = ()


def read_source(config: TrainConfig, folder: str | Path, memory: Memory | None = None) -> Source:
    """The images that `data_dir` names, `folder` in its place for phantoms; files that `memory` knows are not read.

    Raises `UserError` for what is no source, or has classes, patients or splits that cannot be used.
    """
    names = _Names(config.classes, config.positive)
    first = _Names() if config.labels == "subtype" else names
    listed = find_list(folder)
    if listed is None and config.columns != "auto":
        raise UserError(f"--columns {config.columns}: is for lists, and {folder} is a folder; leave it out")
    memory = memory or Memory()
    found = _from_list(listed, config.columns, first, memory) if listed else _from_folder(folder, first, memory)
    if config.labels == "subtype":
        found = _by_subtype(found, names)
    found = _with_patients(found, config.patient_pattern)
    table = with_patients(found.root, found.table, lambda: Cache.open(config.cache_dir).patient_key(), memory)
    found = replace(found, table=table)
    return with_test(found, config)


@dataclass(frozen=True, slots=True)
class _Names:
    """What `--classes` and `--positive` say."""

    classes: str = "auto"
    positive: str = "auto"

    def task(self, names: Iterable[str]) -> Task:
        return Task.of(names, self.classes, self.positive)


def to_evaluate(config: TrainConfig, task: Task, memory: Memory) -> tuple[Path, pd.DataFrame, str]:
    """(root, table, split) of the images that `data_dir` names, to evaluate a model of this task on.

    They are a list's test split, or all of its images as split `external`; or what `index_for_evaluation` finds in a
    folder. A model of subtypes is evaluated on subtypes. Raises `UserError` for labels that the task does not have, and
    classes without an image.
    """
    file = find_list(config.data_dir)
    listed = read_list(file, config.columns) if file else None
    sorted_into = set(listed["class"]) if listed is not None else _folders(config.data_dir)
    # A model of subtypes meets a source that is sorted into NORMAL and PNEUMONIA.
    subtypes = config.labels == "subtype" or (task == SUBTYPES and "PNEUMONIA" in sorted_into)
    if file is None or listed is None:
        root, table, split = index_for_evaluation(config.data_dir, KAGGLE if subtypes else task, memory)
        found = Source(root, table, KAGGLE if subtypes else task)
    else:
        own = Task.of(listed["class"]) if subtypes else _known(file, listed, task)
        found = Source(file.parent, _labelled(file, listed, own, memory), own)
        split = "test" if (found.table["official"] == "test").any() else "external"
        found = replace(found, table=_of_split(found.table, split))
    if subtypes and split != UNLABELLED:
        found = _by_subtype(found, _Names(",".join(task.classes)))
    table = _with_patients(found, config.patient_pattern).table
    if split != UNLABELLED and (missing := set(range(len(task.classes))) - set(table["label"])):
        names = ", ".join(task.classes[label] for label in sorted(missing))
        raise UserError(f"--data-dir {config.data_dir}: has no image of {names} to evaluate on")
    return found.root, table, split


def _folders(data_dir: str) -> set[str]:
    """The names of folders where classes may be, in capitals."""
    top = Path(data_dir).expanduser()
    return {name.upper() for place in (top, top / "test", top / "chest_xray/test") for name in folder_names(place)}


def _of_split(table: pd.DataFrame, split: str) -> pd.DataFrame:
    return table[table["official"] == "test"].reset_index(drop=True) if split == "test" else table


def _known(file: Path, table: pd.DataFrame, task: Task) -> Task:
    """The task, unless the list has other labels."""
    if strange := sorted(set(table["class"]) - set(task.classes)):
        known, named = ", ".join(task.classes), ", ".join(strange[:3])
        raise UserError(f"{file}: {len(strange)} label(s) unknown to the model ({named}), which has {known}")
    return task


def _from_list(file: Path, columns: str, names: _Names, memory: Memory) -> Source:
    """The rows of a list; its labels are names."""
    table = read_list(file, columns)
    task = names.task(table["class"])
    return Source(file.parent, _labelled(file, table, task, memory), task, (f"read from the list {file.name}",))


def _labelled(file: Path, table: pd.DataFrame, task: Task, memory: Memory) -> pd.DataFrame:
    """The rows of a list as a table, with patients and subtypes from file names where it has none."""
    table["label"] = table["class"].map(task.class_to_index)
    parsed = [parse_name(path) for path in table["path"]]
    blank = table["subtype"] == ""
    table.loc[blank, "subtype"] = pd.Series([subtype for _, subtype in parsed], table.index)[blank]
    table["group"] = [own or group for own, (group, _) in zip(table["group"], parsed, strict=True)]
    table = _in_order(table[COLUMNS])
    return table.assign(digest=digest_files(files_in(file.parent, table["path"]), memory))


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    order = {name: index for index, name in enumerate(OFFICIAL)}
    rows = zip(table["official"], table["path"], strict=True)
    keys = [(order.get(split, -1), path.split("/")) for split, path in rows]
    return table.iloc[sorted(range(len(table)), key=keys.__getitem__)].reset_index(drop=True)


def _from_folder(folder: str | Path, names: _Names, memory: Memory) -> Source:
    """Class folders with `train/` above them, or none."""
    top = Path(folder).expanduser()
    flat = top.is_dir() and "train" not in folder_names(top) and _flat_names(top)
    root = top.absolute() if flat else find_root(folder)
    found = _flat_names(root) if flat else sorted({name for split in OFFICIAL for name in folder_names(root / split)})
    task = _task_of_folders(root, found, names)
    if not flat:
        return Source(root, index_folder(root, task, memory), task)
    table = pd.DataFrame(list_classes(root, ".", task), columns=COLUMNS).assign(official="")
    for name, label in task.class_to_index.items():
        if not (table["label"] == label).any():
            raise UserError(f"{root / name}: contains no image; every class is required")
    return Source(root, table.assign(digest=digest_files(files_in(root, table["path"]), memory)), task)


def _flat_names(top: Path) -> list[str]:
    """The names of the class folders directly in a folder; none where `chest_xray/` lies in it."""
    names = folder_names(top)
    return [] if "chest_xray" in names else names


def _task_of_folders(root: Path, found: list[str], names: _Names) -> Task:
    """The task of class folders with these names; any name of the Kaggle set means that set."""
    if names.classes == "auto" and (not found or {name.upper() for name in found} & set(KAGGLE.classes)):
        return names.task(KAGGLE.classes)
    if spellings := differ_in_case(found):
        raise UserError(f"{root}: class folders {' and '.join(spellings)} differ in case only; rename one of them")
    return names.task(found)


def _by_subtype(found: Source, names: _Names) -> Source:
    """The same images, classified by their subtypes; one without a subtype keeps the name of its class."""
    own = pd.Series(found.task.classes)[found.table["label"]].reset_index(drop=True)
    kinds = found.table["subtype"].reset_index(drop=True)
    if (kinds == "unknown").all():
        raise UserError(f"--labels subtype: {found.root} tells no subtypes, by names or a column; use --labels class")
    if found.task == KAGGLE and set(kinds) <= {"normal", "bacteria", "virus", "unknown"}:
        kinds = kinds.str.upper()
        wrong = (kinds == "UNKNOWN") | ((kinds == "NORMAL") != (own == "NORMAL"))
        if wrong.any():
            paths = found.table.loc[wrong.to_numpy(), "path"]
            raise UserError(f"--labels subtype: {some(paths)} with a name that tells no subtype of its class")
    kinds = kinds.where(kinds != "unknown", own)
    own_order = set(kinds) == set(SUBTYPES.classes) and names.classes == "auto"
    task = SUBTYPES if own_order else names.task(kinds)
    labels = kinds.map(task.class_to_index).to_numpy()
    return replace(found, table=found.table.assign(label=labels), task=task)


def _with_patients(found: Source, pattern: str) -> Source:
    """Groups by the pattern, where one is given, and a remark about where the patients come from."""
    table = found.table
    own = int((table["group"] == table["path"]).sum())
    if pattern != "auto":
        table = table.assign(group=_matched(table["path"], table["group"], pattern))
        unmatched = int((table["group"] == table["path"]).sum())
        remark = (
            f"patients: of {own} images by --patient-pattern; {unmatched} without a match count as separate patients"
        )
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
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--patient-pattern {pattern}: not a regular expression ({error})") from error
    if expression.groups != 1:
        raise UserError(f"--patient-pattern {pattern}: has {expression.groups} groups in parentheses; it needs one")
    matches = [expression.search(path) for path in paths]
    if not any(matches):
        raise UserError(f"--patient-pattern {pattern}: matches no path, such as {paths.iloc[0]}")
    rows = zip(matches, paths, groups, strict=True)
    return [match[1] if match and match[1] and path == group else group for match, path, group in rows]


def with_test(found: Source, config: TrainConfig) -> Source:
    """Splits from a file, or a test split made where the source has none."""
    if config.splits != "auto":
        return replace(found, table=_given_splits(found.table, config.splits))
    if (found.table["official"] == "test").any():
        return found
    table = found.table.assign(group=_joined_by_copies(found.table))
    held = grouped_holdout(table["group"], table["label"], config.test_fraction, config.split_seed)
    table["official"] = np.where(held, "test", table["official"].replace("", "train"))
    require_every_class(table.assign(split=table["official"]), "--test-fraction", found.task, ("train", "test"))
    remark = f"test split: made here, {held.sum()} of {len(table)} images by patient (--test-fraction, --split-seed)"
    return replace(found, table=_in_order(table), remarks=(*found.remarks, remark))


def _joined_by_copies(table: pd.DataFrame) -> pd.Series:
    """The groups, those that share an image byte for byte being one, so that no split has a copy on either side."""
    groups, digests = (pd.factorize(table[name])[0] for name in ("group", "digest"))
    size = int(groups.max()) + 1
    edges = coo_array((np.ones(len(table)), (groups, size + digests)), shape=(size + int(digests.max()) + 1,) * 2)
    parts = pd.Series(connected_components(edges, directed=False)[1][groups], table.index)
    return table["group"].groupby(parts).transform("min")


def _given_splits(table: pd.DataFrame, path: str) -> pd.DataFrame:
    """The table with the splits that a file gives, by digest; "" for images that it does not have."""
    try:
        file = Path(path).expanduser()
        given = pd.read_csv(file, dtype=str)[["digest", "split"]].dropna().drop_duplicates()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it needs the columns digest and split"
        raise UserError(f"--splits {path}: cannot be read ({reason})") from error
    if strange := sorted(set(given["split"]) - set(OFFICIAL)):
        raise UserError(f"--splits {file}: {', '.join(strange[:3])} is not a split; use train, val and test")
    if twice := int(given["digest"].duplicated().sum()):
        raise UserError(f"--splits {file}: {twice} image(s) in two splits; give each one")
    table = table.assign(official=table["digest"].map(given.set_index("digest")["split"]).fillna(""))
    known = table[table["official"] != ""]
    if crossing := patients_across(known["group"], known["official"]):
        raise UserError(f"--splits {file}: {len(crossing)} patient(s) in more than one split; a patient belongs in one")
    return _in_order(table)


def require_splits(table: pd.DataFrame, path: str) -> None:
    """Raise `UserError` if images, those left out as unreadable apart, have no split in the file of `--splits`."""
    missing = table.loc[table["official"] == "", "path"]
    if len(missing):
        raise UserError(f"--splits {path}: has no split for {some(missing)}; it was made for other images")


def some(paths: pd.Series) -> str:
    """How many, and the first three."""
    return f"{len(paths)} image(s) ({', '.join(map(str, paths[:3]))}{', …' if len(paths) > 3 else ''})"
