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
from cxr.data.kaggle import is_unreadable
from cxr.data.store import Reading
from cxr.storage import Cache, write_atomically

AUTO, PLAIN, HASHED = "auto", "plain", "hashed"
_NAME = 16  # hex digits
_PNG = b"\x89PNG\r\n\x1a\n"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Headers:
    """An indexed data set, ready to be decoded.

    `table` is the manifest with the names to log in `path` and patients in `group`; `files` maps a name to its file, in
    the order of the table. `order` maps a group to what stands for it when images are split: never a keyed hash, which
    would split the same images in another way on another machine.
    """

    table: pd.DataFrame
    files: Mapping[str, Path]
    order: Mapping[str, str]
    reading: Reading


def read_headers(root: Path, table: pd.DataFrame, cache: Cache, paths: str = AUTO, depth: str = AUTO) -> Headers:
    """Of a manifest whose `path` is relative to `root`. `paths` is auto, plain or hashed; auto hides them if any file
    is DICOM. `depth` is auto or a number of bits. Raises `UserError` when the cache cannot be used.
    """
    files = [root / path for path in table["path"]]
    heads = _in_threads(_head, files, "reading headers")
    radiographs = [dicom.is_dicom(head) or dicom.has_dicom_name(file) for file, head in zip(files, heads, strict=True)]
    hidden = paths == HASHED or (paths == AUTO and any(radiographs))
    key = cache.patient_key() if hidden or any(radiographs) else b""
    named = _named(table, _patients(files, radiographs, key), key if hidden else None)
    deep = {d: file for d, file, head in zip(table["digest"], files, heads, strict=True) if _is_deep(head)}
    reading = Reading(_depth(deep, cache) if depth == AUTO else int(depth), any(radiographs), hidden)
    return Headers(
        table.assign(path=named["path"], group=named["group"]),
        dict(zip(named["path"], files, strict=True)),
        dict(zip(named["group"], named["order"], strict=True)),
        reading,
    )


def _in_threads(read: Callable[[Path], T], files: Sequence[Path], title: str) -> list[T]:
    with dicom.quiet(), ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(read, files), title, len(files), unit="file", leave=False, disable=None))


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(dicom.HEAD)
    except OSError:  # it is reported when it is decoded
        return b""


def _is_deep(head: bytes) -> bool:
    """Whether a file is a PNG of 16-bit grey, by its IHDR chunk: bit depth and colour type."""
    return head.startswith(_PNG) and head[24:26] == bytes([16, 0])


def _patients(files: Sequence[Path], radiographs: Sequence[bool], key: bytes) -> list[str | None]:
    """The patient of each DICOM file; None for other files, and where the header tells none."""
    chosen = [file for file, is_dicom in zip(files, radiographs, strict=True) if is_dicom]
    found = iter(_in_threads(partial(dicom.patient_of, key=key), chosen, "reading patients") if chosen else [])
    return [next(found) if is_dicom else None for is_dicom in radiographs]


def _named(table: pd.DataFrame, patients: Sequence[str | None], key: bytes | None) -> pd.DataFrame:
    """Columns path, group and order (what stands for the group in a split). Paths are hidden if there is a `key`."""
    digests, groups = list(table["digest"]), list(table["group"])
    first: dict[str, str] = {}
    for patient, digest in sorted(zip(patients, digests, strict=True), key=lambda pair: pair[1]):
        first.setdefault(patient or "", digest)
    paths = _hidden_names(digests) if key is not None else list(table["path"])
    rows = zip(patients, groups, table["path"], paths, strict=True)
    shown = [patient or _group(group, path, name, key) for patient, group, path, name in rows]
    order = [first[patient] if patient else group for patient, group in zip(patients, groups, strict=True)]
    return pd.DataFrame({"path": paths, "group": shown, "order": order}, index=table.index)


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


def _depth(deep: Mapping[str, Path], cache: Cache) -> int:
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
