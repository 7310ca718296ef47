"""Images decoded once into a memory-mapped uint8 array, keyed by their content.

The store lies in `<cache>/store/<size>-<resize>/<format>-<key>/`; the key is made of the images' digests, so a
changed file means another store, which takes over the unchanged rows. It is written to a folder of its own and
renamed: two runs may build the same one, the first to finish wins and the other's is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from cxr.data.index import UNREADABLE
from cxr.errors import UserError

UInt8 = npt.NDArray[np.uint8]
MAX_PIXELS = 60_000_000  # a 1300x900 X-ray has 1.2 million; the largest detectors give about 20 million
MIN_SIDE = 32
FORMATS = ("JPEG", "PNG")
_FORMAT = f"2-pillow{PIL.__version__}"  # rows decoded by another Pillow are not taken over
_BUILDING = f".building-{socket.gethostname()}"


class ImageError(ValueError):
    """Bytes that are no usable image; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Store:
    """Decoded images. `images` is [rows, size, size]; `rows` maps a digest to its row, `bad` to the reason
    it has none; `shapes` maps it to the original (width, height, mode). `key` names the content."""

    images: UInt8
    rows: dict[str, int]
    bad: dict[str, str]
    shapes: dict[str, tuple[int, int, str]]
    key: str


def decode_gray(data: bytes, size: int, resize: str) -> tuple[UInt8, tuple[int, int, str]]:
    """Encoded bytes -> (uint8 [size, size], original (width, height, mode)).

    Grey by ITU-R 601 luma as PIL does it, bilinear with antialiasing; transparency over black; 16-bit grey
    scaled to 8; EXIF orientation obeyed. Raises `ImageError` for what cannot be decoded, is smaller than
    32 pixels or larger than 60 million.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            shape = (image.width, image.height, image.mode)
            check_shape(*shape)
            return square_gray(ImageOps.exif_transpose(image), size, resize), shape
    except (ImageError, MemoryError):  # short of memory is no property of the image, and not to be remembered as one
        raise
    except Exception as error:  # whatever a parser trips over in bytes that are not what they claim
        raise ImageError(_reason(data, error)) from error


def square_gray(image: Image.Image, size: int, resize: str) -> UInt8:
    """A decoded image of any mode -> uint8 [size, size], grey."""
    return _square(_to_gray(image), size, resize)


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "zero bytes"
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG or PNG"
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_shape(width: int, height: int, mode: str) -> None:
    """Raise `ImageError` for an image too small, too large, or of values whose range is not known."""
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{width}x{height}: smaller than {MIN_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height}: more than {MAX_PIXELS:,} pixels")
    if mode in ("I", "F"):
        raise ImageError(f"mode {mode}: 32-bit values of unknown range; convert it to 8 or 16 bit grey")


def _to_gray(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("L")
    return image.convert("L") if image.mode in ("L", "RGB") else image.convert("RGB").convert("L")


def _square(image: Image.Image, size: int, resize: str) -> UInt8:
    if resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    elif resize == "pad":
        image = ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color=0)
    else:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def open_store(paths: list[Path], digests: list[str], size: int, resize: str, cache: Path) -> Store:
    """The store of these files, built if it is not there or not intact. `digests` is in the order of `paths`.

    Unreadable images are in `bad`, not an error: the caller decides. Raises `UserError` when the cache cannot be
    written (a full disk) or a file is no longer what its digest says.
    """
    files = dict(zip(digests, paths, strict=True))
    folder = cache / "store" / f"{size}-{resize}" / f"{_FORMAT}-{_key(sorted(files))}"
    try:
        for _ in range(3):  # again if another run, which saw the same damage, has dropped the one just built
            if (store := _read(folder)) is not None:
                return store
            _remove_abandoned(folder.parent)
            _build(folder, files, size, resize)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: cannot write decoded images ({error.strerror}); "
            "free space there or name another --cache-dir"
        ) from error
    raise UserError(f"{folder}: damaged as soon as it is written; check the disk or name another --cache-dir")


def _key(digests: list[str]) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:20]


def _read(folder: Path) -> Store | None:
    """The store in a folder; None when there is none, or when it was damaged (it is then removed)."""
    if not folder.exists():
        return None
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        intact = meta.pop("sha256") == _checksum(folder / "images.u8", meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        warnings.warn(f"{folder}: the decoded images were damaged; decoding them again", stacklevel=3)
        _drop(folder)
        return None
    shape = (len(meta["digests"]), meta["size"], meta["size"])
    images = np.memmap(folder / "images.u8", np.uint8, "r", shape=shape) if shape[0] else np.zeros(shape, np.uint8)
    rows = {digest: row for row, digest in enumerate(meta["digests"])}
    shapes = {d: (w, h, m) for d, (w, h, m) in meta["shapes"].items()}
    return Store(images, rows, meta["bad"], shapes, f"{folder.parent.name}/{folder.name}")


def _checksum(images: Path, meta: dict[str, Any]) -> str:
    """Of both files, as `_write_rows` makes it: a damaged meta.json would tell a wrong row."""
    with images.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256")
    sha.update(json.dumps(meta).encode())
    return sha.hexdigest()


def _drop(folder: Path) -> None:
    """Renamed first: a folder half removed must not be found, and another run may be dropping it, too."""
    work = _work_folder(folder.parent)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(work / "damaged")
    shutil.rmtree(work)


def _work_folder(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{_BUILDING}-{os.getpid()}-", dir=parent))


def _build(folder: Path, files: dict[str, Path], size: int, resize: str) -> None:
    """Decode `files` into a temporary folder beside `folder` and rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    known = _nearest(folder.parent, set(files))
    work = _work_folder(folder.parent)
    try:
        # Here and not around each decoding: the filters belong to the process, threads would restore each other's.
        with warnings.catch_warnings(action="ignore"):
            meta = _write_rows(work / "images.u8", size, _decode_all(files, size, resize, known))
        (work / "meta.json").write_text(json.dumps(meta))
        work.chmod(0o755)
        work.rename(folder)
    except OSError:
        if not (folder / "meta.json").exists():  # else another run was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # whatever ended it, Ctrl-C too; after the rename it is gone


_Row = tuple[str, UInt8, tuple[int, int, str]] | tuple[str, str]


def _decode_all(files: dict[str, Path], size: int, resize: str, known: Store | None) -> Iterator[_Row]:
    def one(item: tuple[str, Path]) -> _Row:
        digest, path = item
        if known and digest in known.rows:
            return digest, known.images[known.rows[digest]], known.shapes[digest]
        try:
            return digest, *decode_gray(_read_same(path, digest), size, resize)
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


def _read_same(path: Path, digest: str) -> bytes:
    """The file's bytes. Raises `UserError` if they are not those the digest names: the store would keep the error.

    `OSError` only for a file that was unreadable when it was indexed, too.
    """
    try:
        data = path.read_bytes()
    except OSError:
        if digest.startswith(UNREADABLE):
            raise
        data = b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"{path}: changed or vanished since the folder was indexed; leave it alone and start again")
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


def _nearest(parent: Path, digests: set[str]) -> Store | None:
    """Of the stores beside, the one that shares the most images, so that only new files are decoded."""
    stores = [store for path in parent.glob(f"{_FORMAT}-*/meta.json") if (store := _read(path.parent)) is not None]
    best = max(stores, key=lambda store: len(digests & store.rows.keys()), default=None)
    return best if best and digests & best.rows.keys() else None


def _remove_abandoned(parent: Path) -> None:
    """Drop the half-built folders of processes of this machine that are no more."""
    for work in parent.glob(f"{_BUILDING}-*"):
        start, pid, _ = work.name.rsplit("-", 2)
        if start == _BUILDING and not _alive(int(pid)):  # not those of a host whose name merely starts like ours
            shutil.rmtree(work, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
