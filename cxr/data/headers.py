"""What must be known of a data set's files before they are decoded: patients of DICOM files, the depth of 16-bit
images, and the names under which images are logged.

A path may identify a person. A hidden image is named by the first 16 hex digits of the sha256 of its bytes, so that
`sha256sum` finds the file again and nobody else can.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pandas as pd
from tqdm import tqdm

from cxr.data import dicom
from cxr.data.decode import ImageError, largest_value
from cxr.data.depth import FULL, fewest_bits
from cxr.data.kaggle import is_unreadable, parse_name
from cxr.data.memory import Facts, Memory, files_in
from cxr.data.store import Reading
from cxr.storage import Cache, write_atomically

AUTO, PLAIN, HASHED = "auto", "plain", "hashed"
_NAME = 16  # hex digits
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Headers:
    """An indexed data set, ready to be decoded.

    `table` is the manifest with the names to log in `path`; `files` maps a name to its file, in the order of the table.
    `groups` maps a name to the group to log. That in the table is for splitting: it is never a keyed hash, which would
    split the same images in another way on another machine.
    """

    table: pd.DataFrame
    files: Mapping[str, str]
    groups: Mapping[str, str]
    reading: Reading


def with_patients(
    root: Path, table: pd.DataFrame, key: Callable[[], bytes], memory: Memory | None = None
) -> pd.DataFrame:
    """A manifest whose groups are the patients that DICOM files tell, each by its first digest, which is the same on
    every machine; a new column `patient` holds their keyed hashes, or nothing.

    Headers come before file names; a group that is not that of the file name was given, and stays. Without DICOM
    files, the manifest as it was, and no `key` is asked for. Raises `UserError` when the key cannot be had.
    """
    files = files_in(root, table["path"])
    radiographs = _radiographs(files, (memory or Memory()).facts(files))
    if not any(radiographs):
        return table
    by_name = [parse_name(path)[0] == group for path, group in zip(table["path"], table["group"], strict=True)]
    asked = [radiograph and named for radiograph, named in zip(radiographs, by_name, strict=True)]
    patients = _patients(files, asked, key())
    first: dict[str, str] = {}
    for digest, patient in sorted(zip(table["digest"], patients, strict=True)):
        first.setdefault(patient, digest)
    groups = [first[patient] if patient else group for patient, group in zip(patients, table["group"], strict=True)]
    return table.assign(group=groups, patient=patients)


def read_headers(
    root: Path, table: pd.DataFrame, cache: Cache, paths: str = AUTO, depth: str = AUTO, memory: Memory | None = None
) -> Headers:
    """Of a manifest whose `path` is relative to `root`, with patients or not yet. `paths` is auto, plain or hashed;
    auto hides them if any file is DICOM. `depth` is auto or a number of bits. Raises `UserError` when the cache cannot
    be used.
    """
    memory, files = memory or Memory(), files_in(root, table["path"])
    facts = memory.facts(files)
    radiographs = any(_radiographs(files, facts))
    if radiographs and "patient" not in table:
        table = with_patients(root, table, cache.patient_key, memory)
    hidden = paths == HASHED or (paths == AUTO and radiographs)
    deep = {d: file for d, file, each in zip(table["digest"].tolist(), files, facts, strict=True) if each.deep}
    reading = Reading(_depth(deep, cache) if depth == AUTO else int(depth), radiographs, hidden)
    names = _hidden_names(table["digest"]) if hidden else table["path"].tolist()
    groups = _groups(table, names, cache.patient_key() if hidden else None)
    return Headers(
        table.assign(path=names).drop(columns="patient", errors="ignore"),
        dict(zip(names, files, strict=True)),
        dict(zip(names, groups, strict=True)),
        reading,
    )


def _radiographs(files: Sequence[str], facts: Sequence[Facts]) -> list[bool]:
    """Which files are DICOM."""
    return [each.dicom or dicom.has_dicom_name(file) for file, each in zip(files, facts, strict=True)]


def _in_threads(read: Callable[[Path], T], files: Sequence[str], title: str) -> list[T]:
    with dicom.quiet(), ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(read, map(Path, files)), title, len(files), unit="file", leave=False, disable=None))


def _patients(files: Sequence[str], asked: Sequence[bool], key: bytes) -> list[str]:
    """The patient of each DICOM file that is asked for; empty for others, and where the header tells none."""
    chosen = [file for file, is_asked in zip(files, asked, strict=True) if is_asked]
    found = iter(_in_threads(partial(dicom.patient_of, key=key), chosen, "reading patients"))
    return [next(found) or "" if is_asked else "" for is_asked in asked]


def _groups(table: pd.DataFrame, names: Sequence[str], key: bytes | None) -> list[str]:
    """The groups to log. Those that file names tell are hidden if there is a `key`."""
    patients = table["patient"].tolist() if "patient" in table else [""] * len(table)
    rows = zip(patients, table["group"].tolist(), table["path"].tolist(), names, strict=True)
    return [patient or _group(group, path, name, key) for patient, group, path, name in rows]


def _group(group: str, path: str, name: str, key: bytes | None) -> str:
    """A group told by the file name: the file itself where the name tells none, else a keyed hash if hidden."""
    if key is None or group == path:
        return name if group == path else group
    return hmac.new(key, f"file name\0{group}".encode(), hashlib.sha256).hexdigest()[:_NAME]


def _hidden_names(digests: Iterable[str]) -> list[str]:
    """A name for each image: the beginning of its digest, numbered where images are the same."""
    seen: Counter[str] = Counter()
    names = []
    for digest in digests:
        short = hashlib.sha256(digest.encode()).hexdigest() if is_unreadable(digest) else digest
        seen[digest] += 1
        names.append(short[:_NAME] + (f"-{seen[digest]}" if seen[digest] > 1 else ""))
    return names


def _depth(deep: Mapping[str, str], cache: Cache) -> int:
    """The fewest bits that hold every 16-bit image, by digest; 16 if there is none. Found once for a data set."""
    if not deep:
        return FULL
    file = cache.depth(hashlib.sha256(json.dumps(sorted(deep)).encode()).hexdigest()[:20])
    try:
        return fewest_bits(int(json.loads(file.read_text())["largest"]))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):  # not looked for yet, or damaged
        largest = max(_in_threads(_largest, list(deep.values()), "reading 16-bit images"))
        write_atomically(file, lambda stream: stream.write(json.dumps({"largest": largest}).encode()))
        return fewest_bits(largest)


def _largest(file: Path) -> int:
    try:
        return largest_value(file.read_bytes())
    except (OSError, ImageError):  # it is reported when it is decoded
        return 0
