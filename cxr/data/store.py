"""Images decoded once into a memory-mapped uint8 array, keyed by their content.

The store lies in `<cache>/store/<size>-<resize>/<format>-<key>/`; the key is made of the images' digests, so a
changed file means another store, which takes over the unchanged rows. It is written to a new folder and
renamed: two runs may build the same one, the first to finish wins and the other's is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import PIL
from tqdm import tqdm

from cxr.data import dicom
from cxr.data.decode import ImageError, UInt8, decode_gray
from cxr.data.depth import FULL
from cxr.data.kaggle import is_unreadable
from cxr.data.memory import Memory, StrPath, state_of
from cxr.errors import UserError
from cxr.storage import Cache, new_folder, remove_folder

_FORMAT = f"2-pillow{PIL.__version__}"  # rows decoded by another Pillow are not taken over


@dataclass(frozen=True, slots=True)
class Store:
    """Decoded images. `images` is [rows, size, size]; `rows` maps a digest to its row, `bad` to the reason
    it has none; `shapes` maps it to the original (width, height, mode). `key` names the content."""

    images: UInt8
    rows: dict[str, int]
    bad: dict[str, str]
    shapes: dict[str, tuple[int, int, str]]
    key: str

    def of(self, digests: Iterable[str]) -> Gathered:
        """The images of these digests, in their order; each must be in the store."""
        return Gathered(self.images, np.array([self.rows[digest] for digest in digests], np.int64))


class Images(Protocol):
    """Images [n, s, s], of which one [s, s] can be had at a time: an array, or `Gathered`."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> UInt8: ...


@dataclass(frozen=True, slots=True)
class Gathered:
    """Some rows [n] of decoded images, read when they are asked for: a copy of all of them may not fit into memory."""

    images: UInt8
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int, /) -> UInt8:
        image: UInt8 = self.images[self.rows[row]]
        return image


@dataclass(frozen=True, slots=True)
class Reading:
    """How the files of a data set are read: the `depth` in bits of 16-bit grey, whether any is DICOM, and whether
    messages hide their paths."""

    depth: int = FULL
    dicom: bool = False
    hidden: bool = False

    @property
    def format(self) -> str:
        """The beginning of the names of stores whose rows may be taken over: decoded in the same way."""
        deep = f"{self.depth}bit-" if self.depth != FULL else ""
        return f"{deep}dicom1-{dicom.decoders()}-{_FORMAT}" if self.dicom else f"{deep}{_FORMAT}"


def open_store(
    paths: Sequence[StrPath], digests: list[str], size: int, resize: str, cache: Cache, reading: Reading = Reading()
) -> Store:
    """The store of these files, built if it is not there or not intact. `digests` is in the order of `paths`.

    Unreadable images are in `bad`, not an error: the caller decides. Raises `UserError` when the cache cannot be
    written (a full disk) or a file is no longer what its digest says.
    """
    files, memory = dict(zip(digests, paths, strict=True)), Memory.of(cache)
    folder = cache.decoded(size, resize) / f"{reading.format}-{_key(sorted(files))}"
    try:
        for _ in range(3):  # again if another run, which saw the same damage, has removed the new one
            if (store := _read(folder, memory)) is not None:
                return store
            _build(folder, files, size, resize, reading, memory)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: cannot write decoded images ({error.strerror}); "
            "free space there or name another --cache-dir"
        ) from error
    raise UserError(f"{folder}: damaged as soon as it is written; check the disk or name another --cache-dir")


def _key(digests: list[str]) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:20]


def _read(folder: Path, memory: Memory) -> Store | None:
    """The store in a folder; None when there is none, or when it was damaged (it is then removed).

    All of it is read only if it was changed since that was done last, by size and time.
    """
    if not folder.exists():
        return None
    try:
        text = (folder / "meta.json").read_text()
        meta: dict[str, Any] = json.loads(text)
        intact = _is_intact(folder / "images.u8", meta, hashlib.sha256(text.encode()).hexdigest(), memory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        warnings.warn(f"{folder}: the decoded images were damaged; decoding them again", stacklevel=3)
        remove_folder(folder)
        return None
    shape = (len(meta["digests"]), meta["size"], meta["size"])
    images = np.memmap(folder / "images.u8", np.uint8, "r", shape=shape) if shape[0] else np.zeros(shape, np.uint8)
    rows = {digest: row for row, digest in enumerate(meta["digests"])}
    shapes = {d: (w, h, m) for d, (w, h, m) in meta["shapes"].items()}
    return Store(images, rows, meta["bad"], shapes, f"{folder.parent.name}/{folder.name}")


def _is_intact(images: Path, meta: dict[str, Any], token: str, memory: Memory) -> bool:
    """Whether both files are as they were written. `token` stands for the text of `meta`."""
    expected = meta.pop("sha256")
    if memory.confirms(images, token):
        return True
    state = state_of(images)
    if expected != _checksum(images, meta):
        return False
    memory.note(images, token, state)
    return True


def _checksum(images: Path, meta: dict[str, Any]) -> str:
    """Of both files, as `_write_rows` makes it: a damaged meta.json would tell a wrong row."""
    with images.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256")
    sha.update(json.dumps(meta).encode())
    return sha.hexdigest()


def _build(folder: Path, files: dict[str, StrPath], size: int, resize: str, reading: Reading, memory: Memory) -> None:
    """Decode `files` into a new `folder`."""
    known = _nearest(folder.parent, reading, set(files), memory)
    with new_folder(folder) as work:
        # Here and not around each decoding: the filters belong to the process, threads would restore each other's.
        with warnings.catch_warnings(action="ignore"):
            meta = _write_rows(work / "images.u8", size, _decode_all(files, size, resize, reading, known))
        (work / "meta.json").write_text(json.dumps(meta))


_Row = tuple[str, UInt8, tuple[int, int, str]] | tuple[str, str]


def _decode_all(
    files: dict[str, StrPath], size: int, resize: str, reading: Reading, known: Store | None
) -> Iterator[_Row]:
    def one(item: tuple[str, StrPath]) -> _Row:
        digest, path = item[0], Path(item[1])
        if known and digest in known.rows:
            return digest, known.images[known.rows[digest]], known.shapes[digest]
        try:
            data = _read_same(path, digest, reading.hidden)
            return digest, *decode_gray(data, size, resize, reading.depth, dicom.has_dicom_name(path))
        except (OSError, ImageError) as error:
            return digest, getattr(error, "strerror", None) or str(error)

    with ThreadPoolExecutor() as pool:
        yield from tqdm(
            pool.map(one, sorted(files.items())),
            "decoding",
            len(files),
            unit="img",
            leave=False,
            disable=None,
        )


def _read_same(path: Path, digest: str, hidden: bool) -> bytes:
    """The file's bytes. Raises `UserError` if they are not those the digest names: the store would keep the error.

    `OSError` only for a file that was unreadable when it was indexed, too.
    """
    try:
        data = path.read_bytes()
    except OSError:
        if is_unreadable(digest):
            raise
        data = b""
    if hashlib.sha256(data).hexdigest() != digest:
        name = digest[:16] if hidden else path
        raise UserError(f"{name}: changed or vanished since the folder was indexed; leave it alone and start again")
    return data


def _write_rows(path: Path, size: int, rows: Iterator[_Row]) -> dict[str, Any]:
    """Written with `write`, not through a memory map: on a full disk the latter dies of SIGBUS."""
    sha, digests, shapes, bad = hashlib.sha256(), [], {}, {}
    with path.open("wb") as file:
        for digest, *rest in rows:
            if len(rest) == 1:
                bad[digest] = rest[0]
                continue
            data = np.ascontiguousarray(rest[0]).tobytes()
            sha.update(data)
            file.write(data)
            digests.append(digest)
            shapes[digest] = rest[1]
        file.flush()
        os.fsync(file.fileno())
    meta = {"size": size, "digests": digests, "shapes": shapes, "bad": bad}
    sha.update(json.dumps(meta).encode())
    return {**meta, "sha256": sha.hexdigest()}


def _nearest(parent: Path, reading: Reading, digests: set[str], memory: Memory) -> Store | None:
    """Of the stores beside, the one that shares the most images, so that only new files are decoded."""
    found = parent.glob(f"{reading.format}-*/meta.json")
    stores = [store for path in found if (store := _read(path.parent, memory)) is not None]
    best = max(stores, key=lambda store: len(digests & store.rows.keys()), default=None)
    return best if best and digests & best.rows.keys() else None
