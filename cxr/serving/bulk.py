"""Predictions for any number of images: read and decoded beside the network, written as they come, in flat memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from tqdm import tqdm

from cxr.data import dicom
from cxr.data.decode import UInt8
from cxr.data.kaggle import is_image
from cxr.data.lists import LIST_SUFFIXES, read_paths
from cxr.errors import UserError
from cxr.serving.predictor import Predictor

_BATCH = 32
_AHEAD = 4  # batches that are decoded before the network needs them
Read = UInt8 | str  # a prepared image, or why there is none


def image_files(targets: Sequence[Path]) -> list[Path]:
    """The images that files, folders (with all folders in them) and lists name, in order.

    Raises `UserError` for a list that cannot be read, and a folder without images.
    """
    found: list[Path] = []
    for target in targets:
        if _is_folder(target):
            inside = sorted(p for p in target.rglob("*") if not _is_hidden(p.relative_to(target)) and is_image(p))
            if not inside:
                raise UserError(f"{target}: contains no image")
            found += inside
        else:
            found += read_paths(target.absolute()) if target.suffix.lower() in LIST_SUFFIXES else [target]
    return found


def _is_folder(target: Path) -> bool:
    try:
        return target.is_dir()
    except (OSError, ValueError):  # a name that no file can have: it is reported when it is read
        return False


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def predicted(predictor: Predictor, paths: Sequence[Path]) -> Iterator[pd.DataFrame]:
    """A table for each batch of images: image, the columns of `Predictor.predict`, and error (None, or why an image
    cannot be read, its other columns then missing)."""
    for files, images in _batches(predictor, paths):
        good = [index for index, image in enumerate(images) if not isinstance(image, str)]
        table = pd.DataFrame({"image": [os.fsencode(file).decode(errors="replace") for file in files]})
        if good:
            found = predictor.predict([image for image in images if isinstance(image, np.ndarray)])
            table = table.join(found.set_index(pd.Index(good)).convert_dtypes())  # whole numbers stay whole beside gaps
        table["error"] = pd.Series([image if isinstance(image, str) else None for image in images], dtype=object)
        yield table


def _batches(predictor: Predictor, paths: Sequence[Path]) -> Iterator[tuple[Sequence[Path], list[Read]]]:
    """Files and what was read of them, a few batches ahead."""

    def read(path: Path) -> Read:
        try:
            return predictor.prepare(path.read_bytes(), dicom.has_dicom_name(path))
        except (OSError, ValueError) as error:  # ValueError: an ImageError, or a name that no file can have
            return str(getattr(error, "strerror", None) or error)

    waiting: deque[tuple[Sequence[Path], list[Future[Read]]]] = deque()
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), _BATCH):
            files = paths[start : start + _BATCH]
            waiting.append((files, [pool.submit(read, file) for file in files]))
            if len(waiting) > _AHEAD:
                files, futures = waiting.popleft()
                yield files, [future.result() for future in futures]
        for files, futures in waiting:
            yield files, [future.result() for future in futures]


def write_predictions(predictor: Predictor, paths: Sequence[Path], out: Path) -> tuple[int, list[tuple[str, str]]]:
    """Write the predictions of all images as CSV; returns how many there are, and (path, reason) of unreadable images.

    The file appears when it is complete. Raises `UserError` if it cannot be written.
    """
    if not out.name:
        raise UserError(f"--out {out}: names no file")
    work = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with work.open("w", encoding="utf-8", newline="") as stream:
            counted = _write(predictor, paths, stream)
        work.replace(out)
        return counted
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
    finally:
        with suppress(OSError):
            work.unlink()


def _write(predictor: Predictor, paths: Sequence[Path], stream: TextIO) -> tuple[int, list[tuple[str, str]]]:
    count, columns = 0, ["image", *predictor.card.answers(predictor.familiar is not None), "error"]
    bad: list[tuple[str, str]] = []
    pd.DataFrame(columns=columns).to_csv(stream, index=False)
    with tqdm(total=len(paths), desc="predicting", unit="img", leave=False, disable=None) as bar:
        for table in predicted(predictor, paths):
            table.reindex(columns=columns).to_csv(stream, index=False, header=False)
            failed = table[table["error"].notna()]
            bad += zip(failed["image"], failed["error"], strict=True)
            count += len(table) - len(failed)
            bar.update(len(table))
    return count, bad
