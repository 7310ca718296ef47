"""What a source of images would be read as: classes, splits, patients, formats and sizes, and what is odd about it."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from cxr.config import TrainConfig
from cxr.data import dicom
from cxr.data.decode import FORMATS
from cxr.data.sources import Source
from cxr.data.splits import assign_splits, patients_across

_SHOWN = 3
_RARE = 0.01  # share of images below which a format is odd
_FEW = 30  # images of a class in a split below which its metrics say little
Header = tuple[str, int, int]  # format and mode, width, height; "" if it cannot be read


def checked(source: Source, config: TrainConfig) -> list[str]:
    """The lines of `cxr data check`. Raises `UserError` if the images cannot be split.

    Only the headers of the files are read here.
    """
    table = assign_splits(source.table, config.kept_split, config.val_fraction, config.split_seed, source.task)
    headers = read_headers(source.root / path for path in table["path"])
    table = table.assign(format=headers["format"], width=headers["width"], height=headers["height"])
    odd = _odd(table, source)
    return [
        f"images: {len(table)} in {source.root}",
        f"classes: {source.task.words()}",
        *source.remarks,
        *_counts(table, source),
        f"patients: {table['group'].nunique()}, with {len(table) / table['group'].nunique():.2f} images each",
        *_formats(table),
        *([f"odd: {line}" for line in odd] or ["odd: nothing found; `cxr data audit` also compares the images"]),
        "first rows:",
        *_rows(table.head(_SHOWN), source),
    ]


def _rows(table: pd.DataFrame, source: Source) -> list[str]:
    """The rows, with the names of their classes, as lines of a table."""
    shown = table[["path", "split", "group", "subtype"]].copy()
    shown.insert(1, "class", [source.task.classes[label] for label in table["label"]])
    return shown.to_string(index=False).splitlines()


def read_headers(paths: Iterable[Path]) -> pd.DataFrame:
    """Columns format (such as `JPEG L`; "" if the header cannot be read), width and height, in order."""
    files = list(paths)
    with dicom.quiet(), ThreadPoolExecutor() as pool:
        rows = list(tqdm(pool.map(_header, files), "headers", len(files), unit="img", leave=False, disable=None))
    return pd.DataFrame(rows, columns=["format", "width", "height"])


def _header(path: Path) -> Header:
    try:
        if dicom.has_dicom_name(path) or dicom.is_dicom(dicom.head_of(path)):
            header = dicom.read_header(path.read_bytes())
            return f"DICOM {header.mode}", header.width, header.height
        with Image.open(path, formats=FORMATS) as image:
            return f"{image.format} {image.mode}", image.width, image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "", 0, 0


def _counts(table: pd.DataFrame, source: Source) -> list[str]:
    """A line for each split: images of each class, and patients."""
    lines = []
    for split in ("train", "val", "test"):
        part = table[table["split"] == split]
        counts = np.bincount(part["label"], minlength=len(source.task.classes))
        named = ", ".join(f"{name} {count}" for name, count in zip(source.task.classes, counts, strict=True))
        lines.append(f"{split}: {len(part)} images of {part['group'].nunique()} patients: {named}")
    return lines


def _formats(table: pd.DataFrame) -> list[str]:
    known = table[table["format"] != ""]
    if known.empty:
        return []
    kinds = ", ".join(f"{kind} {count}" for kind, count in known["format"].value_counts().items())
    sides = known[["width", "height"]].to_numpy()
    low, middle, high = ("{:.0f}x{:.0f}".format(*of(sides, axis=0)) for of in (np.min, np.median, np.max))
    return [f"formats: {kinds}", f"sizes: {low} to {high}, median {middle}"]


def _odd(table: pd.DataFrame, source: Source) -> list[str]:
    """What a person should look at."""
    lines = []
    if len(bad := table.loc[table["format"] == "", "path"]):
        lines.append(f"{len(bad)} files whose header cannot be read ({', '.join(bad[:_SHOWN])})")
    if copies := int(table["digest"].duplicated().sum()):
        lines.append(f"{copies} images are copies of others, byte for byte")
    if crossing := patients_across(table["group"], table["split"]):
        lines.append(f"{len(crossing)} patients are in more than one split")
    shares = table["format"].value_counts(normalize=True)
    if rare := [f"{kind}" for kind, share in shares.items() if kind and share < _RARE]:
        lines.append(f"formats of less than 1% of the images: {', '.join(rare)}")
    counts = table.groupby(["split", "label"]).size().reset_index(name="images")
    for split, label, count in counts[counts["images"] < _FEW].itertuples(index=False):
        lines.append(f"{split} has only {count} images of {source.task.classes[label]}")
    return lines
