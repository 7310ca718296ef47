"""Lists of images with their labels: CSV and TSV with a header, and JSON in the form of MONAI's data lists."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from cxr.data.splits import patients_across
from cxr.errors import UserError
from cxr.task import differ_in_case

LIST_SUFFIXES = (".csv", ".tsv", ".json")
# What a column may be called, written small and without separators.
NAMES = {
    "path": ("path", "filename", "file", "filepath", "image", "imagepath"),
    "label": ("label", "class", "finding", "diagnosis", "target"),
    "patient": ("patient", "patientid", "subject", "subjectid"),
    "split": ("split", "set", "subset"),
    "subtype": ("subtype",),
}
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_METADATA = "metadata.csv"  # of a Hugging Face image folder
_BLANK = ("na", "n/a", "nan", "null")  # what programs write for nothing
_MAX_BYTES = 2_000_000_000


def find_list(data_dir: str | Path) -> Path | None:
    """The list that `data_dir` is, or that lies in it as `metadata.csv`; None if it is a folder of images."""
    try:
        path = Path(data_dir).expanduser().absolute()
        if path.is_file():
            if path.suffix.lower() in LIST_SUFFIXES:
                return path
            raise UserError(
                f"--data-dir {path}: neither a folder nor a list; give a folder, or a .csv, .tsv or .json file"
            )
        return path / _METADATA if _has_metadata(path) else None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--data-dir {data_dir}: cannot be read ({reason}); give an absolute path") from error


def _has_metadata(folder: Path) -> bool:
    """Whether a folder is one of Hugging Face's: a `metadata.csv` that names files, and no splits beside it."""
    file = folder / _METADATA
    if not file.is_file() or any((folder / name).is_dir() for name in ("train", "chest_xray")):
        return False
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        return "file_name" in stream.readline()


def read_list(file: Path, columns: str = "auto") -> pd.DataFrame:
    """The rows of a list: path (relative to its folder, posix), class, group (the patient, or ""), official (the split,
    or "") and subtype (or "").

    Raises `UserError` for a list that cannot be read, lacks a column, names images twice, outside its folder or that do
    not exist, spells a label in two ways, has blank labels, unknown splits, or a patient in two splits.
    """
    raw = _read_json(file) if file.suffix.lower() == ".json" else _read_table(file)
    if raw.empty:
        raise UserError(f"{file}: has no rows")
    chosen = _columns(file, raw, columns)
    table = pd.DataFrame({name: raw[column].str.strip() for name, column in chosen.items()})
    for name in {"label", "patient", "subtype"} & set(table.columns):
        table[name] = table[name].mask(table[name].str.casefold().isin(_BLANK), "")
    table = table.reindex(columns=list(NAMES), fill_value="").rename(columns={"label": "class", "patient": "group"})
    table["official"] = _splits(file, table.pop("split"))
    table["path"] = _relative(file, table["path"])
    _require_labels(file, table)
    _require_unique(file, table)
    _require_files(file, table["path"])
    return table


def read_paths(file: Path) -> list[Path]:
    """The images that a list names, whether or not it has labels. Raises `UserError` as `read_list` does."""
    raw = _read_json(file) if file.suffix.lower() == ".json" else _read_table(file)
    if raw.empty:
        raise UserError(f"{file}: has no rows")
    paths = _relative(file, raw[_columns(file, raw, "auto", ("path",))["path"]].str.strip())
    return [file.parent / path for path in paths]


def _read_table(file: Path) -> pd.DataFrame:
    """A CSV or TSV, its separator being the one of tab, comma and semicolon that the header has most of."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise UserError(f"{file}: larger than {_MAX_BYTES / 1e9:g} GB; is this a list?")
        with file.open(encoding="utf-8-sig") as stream:
            header = stream.readline()
        separator = max("\t,;", key=header.count)
        options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "index_col": False}
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # of rows that are too long
            table: pd.DataFrame = pd.read_csv(file, sep=separator, encoding="utf-8-sig", **options)
            return table
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:  # UnicodeDecodeError is a ValueError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a CSV with a header in UTF-8 ({reason})") from error


def _read_json(file: Path) -> pd.DataFrame:
    """A data list as MONAI has it: an object of lists, `training`, `validation` and `test`, of objects with `image` and
    `label`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if "\\ud" in text.lower():  # perhaps half a character, which no table can hold
            json.dumps(content, ensure_ascii=False).encode()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    lists = content if isinstance(content, dict) else {"": content}
    known = {name for names in SPLITS.values() for name in names}
    rows: list[dict[str, Any]] = []
    for split, items in lists.items():
        if split and split not in known:
            continue  # what else describes the data set
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f'{file}: {split or "it"} is not a list of objects such as {{"image": …, "label": …}}')
        if any(isinstance(value, list | dict) for item in items for value in item.values()):
            raise UserError(f"{file}: {split or 'it'} has lists as values; an image has one path and one label")
        rows += [{**item, **({"split": split} if split else {})} for item in items]
    return pd.DataFrame(rows).fillna("").astype(str) if rows else pd.DataFrame()


def _columns(
    file: Path, raw: pd.DataFrame, columns: str, needed: tuple[str, ...] = ("path", "label")
) -> dict[str, str]:
    """What each column means -> its name in the list."""
    plain = {_plain(name): name for name in map(str, reversed(raw.columns))}
    found = {meaning: plain[name] for meaning, names in NAMES.items() for name in names[::-1] if name in plain}
    if columns != "auto":
        found |= _given(raw, columns)
    for meaning in needed:
        if meaning not in found:
            have = ", ".join(map(str, raw.columns))
            raise UserError(f"{file}: no column for the {meaning} in {have[:200]}; name it by --columns {meaning}=…")
    return found


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _given(raw: pd.DataFrame, columns: str) -> dict[str, str]:
    """`path=Image,label=Finding` as a mapping."""
    found = {}
    for part in columns.split(","):
        meaning, _, name = part.partition("=")
        if meaning not in NAMES or not name:
            raise UserError(f"--columns {columns}: use the form path=Image,label=Finding, of {', '.join(NAMES)}")
        if name not in raw.columns:
            raise UserError(f"--columns {columns}: the list has no column {name}; it has {', '.join(raw.columns)}")
        found[meaning] = name
    return found


def _splits(file: Path, texts: pd.Series) -> pd.Series:
    """The split of each row under our names."""
    names = {name: split for split, every in SPLITS.items() for name in every} | {"": ""}
    splits = texts.str.casefold().map(names)
    if splits.isna().any():
        strange = ", ".join(sorted(set(texts[splits.isna()]))[:3])
        raise UserError(f"{file}: {splits.isna().sum()} row(s) of unknown split ({strange}); use train, val or test")
    if (blank := (splits == "").sum()) and blank < len(splits):
        raise UserError(f"{file}: {blank} of {len(splits)} rows have no split; give all rows one, or none")
    return splits


def _relative(file: Path, texts: pd.Series) -> pd.Series:
    """Paths relative to the list's folder, by their text: where links lead does not matter."""
    folder = file.parent
    paths = [Path(os.path.normpath(folder / text)) for text in texts]
    _refuse(file, texts[[path == folder for path in paths]], "without a path")
    inside = [path.is_relative_to(folder) for path in paths]
    _refuse(file, texts[[not each for each in inside]], "outside the list's folder; move the list above the images")
    return pd.Series([path.relative_to(folder).as_posix() for path in paths], texts.index)


def _require_labels(file: Path, table: pd.DataFrame) -> None:
    _refuse(file, table.loc[table["class"] == "", "path"], "without a label")
    if spellings := differ_in_case(table["class"].unique()):
        raise UserError(f"{file}: one label in {len(spellings)} spellings ({', '.join(spellings)}); use one")


def _require_unique(file: Path, table: pd.DataFrame) -> None:
    """Raise `UserError` for images named twice, and patients in several splits."""
    _refuse(file, table.loc[table["path"].duplicated(), "path"], "named more than once")
    known = table[table["group"] != ""]
    if several := patients_across(known["group"], known["official"]):
        names = ", ".join(several[:3])
        raise UserError(f"{file}: {len(several)} patient(s) in more than one split ({names}); a patient belongs in one")


def _require_files(file: Path, paths: pd.Series) -> None:
    exists = [os.path.isfile(file.parent / path) for path in paths]
    _refuse(file, paths[[not each for each in exists]], "that do not exist")


def _refuse(file: Path, rows: pd.Series, what: str) -> None:
    """Raise `UserError` if there are any rows, with their number and the first three."""
    if len(rows):
        named = ", ".join(repr(str(row)) for row in rows[:3])
        raise UserError(f"{file}: {len(rows)} image(s) {what}: {named}{', …' if len(rows) > 3 else ''}")
