"""Seeded mutations of bytes, and small valid images of every kind to mutate."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from cxr.data.phantoms import phantom
from dicom_check import dicom_of

_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def _flip(data: bytearray, random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 8))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _replace(data: bytearray, random: Random) -> None:
    place = random.randrange(len(data))
    data[place : place + random.randrange(1, 9)] = random.randbytes(random.randrange(1, 9))


def _truncate(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data)) :]


def _remove(data: bytearray, random: Random) -> None:
    place = random.randrange(len(data))
    del data[place : place + random.randrange(1, 65)]


def _repeat(data: bytearray, random: Random) -> None:
    start = random.randrange(len(data))
    part = data[start : start + random.randrange(1, 257)] * random.choice((1, 2, 50))
    place = random.randrange(len(data))
    data[place:place] = part


def _splice(data: bytearray, random: Random) -> None:
    """The beginning, and then the rest from another place."""
    data[random.randrange(len(data)) :] = data[random.randrange(len(data)) :]


def _set_length(data: bytearray, random: Random) -> None:
    """An extreme number of 1, 2 or 4 bytes, in either order; in the first quarter as often as anywhere."""
    size = random.choice((1, 2, 4))
    end = max(1, len(data) // random.choice((1, 4)))
    number = random.choice(_EXTREMES) & ((1 << 8 * size) - 1)
    place = random.randrange(end)
    data[place : place + size] = number.to_bytes(size, random.choice(("little", "big")))


MUTATIONS: tuple[Callable[[bytearray, Random], None], ...] = (
    *(_flip, _flip, _replace, _truncate, _remove, _repeat, _splice, _set_length, _set_length),
)


def mutated(data: bytes, random: Random) -> bytes:
    """The bytes after one to four mutations."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        if changed:
            random.choice(MUTATIONS)(changed, random)
    return bytes(changed)


_STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 0.5, -1e308, 1e308, float("nan"), float("inf"), 10**20, "", " ", "none", "\0", "ä"),
    *("x" * 1000, "1", "\ud800", [], {}, [[]], {"": None}, [0] * 100, "resnet18", "pad", ["NORMAL"]),
)


def mutated_json(content: Any, random: Random) -> Any:
    """A copy in which one value is strange, gone, repeated, or under another name; now and then two."""
    copy = json.loads(json.dumps(content))
    for _ in range(random.choice((1, 1, 1, 2))):
        inner = copy
        while isinstance(inner, dict | list) and inner:
            key = random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if not isinstance(inner[key], dict | list) or not inner[key] or random.random() < 0.3:
                _change(inner, key, random)
                break
            inner = inner[key]
    return copy


def _change(inner: Any, key: Any, random: Random) -> None:
    way = random.randrange(8)
    if way == 0:
        del inner[key]
    elif way == 1 and isinstance(inner, dict):
        inner[random.choice((f"{key} ", "other", str(key).upper(), ""))] = inner.pop(key)
    elif way == 2 and isinstance(inner, list):
        inner *= random.choice((2, 100))
    else:
        inner[key] = random.choice(_STRANGE)


def mutated_png(data: bytes, random: Random) -> bytes:
    """A PNG one of whose chunks is mutated, its pixels before they are compressed, with right checksums: others are
    refused before anything else is looked at."""
    chunks, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += size + 12
    chosen = random.randrange(len(chunks))
    name, content = chunks[chosen]
    if name == b"IDAT" and random.random() < 0.7:
        content = zlib.compress(mutated(zlib.decompress(content), random))
    else:
        content = mutated(content, random)
    chunks[chosen] = (random.choice((name, name, name, b"tRNS", b"gAMA", b"iCCP", b"eXIf", b"acTL")), content)
    random.choice((chunks.reverse, chunks.sort, *[lambda: None] * 18))()
    parts = [len(each).to_bytes(4, "big") + kind + each + _checksum(kind + each) for kind, each in chunks]
    return data[:8] + b"".join(parts)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpegs(size: int = 64) -> list[bytes]:
    """Grey, colour, CMYK, progressive, and with EXIF orientation."""
    grey = Image.fromarray(phantom(np.random.default_rng(0), "virus", size))
    exif = Image.Exif()
    exif[0x0112] = 6
    others = [grey.convert("RGB"), grey.convert("CMYK")]
    plain = [_encoded(image, "JPEG") for image in (grey, *others)]
    return [*plain, _encoded(others[0], "JPEG", progressive=True), _encoded(grey, "JPEG", exif=exif.tobytes())]


def pngs(size: int = 64) -> list[bytes]:
    """Of 1, 8 and 16 bits, with a palette, and with transparency."""
    grey = Image.fromarray(phantom(np.random.default_rng(1), "normal", size))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    others = [grey.convert(mode) for mode in ("1", "P", "LA", "RGBA")]
    return [_encoded(image, "PNG") for image in (grey, deep, *others)]


def dicoms(size: int = 64) -> list[bytes]:
    """Uncompressed, RLE and JPEG 2000; with a window, a LUT, rescaled, and inverted."""
    grey = Image.fromarray(phantom(np.random.default_rng(2), "bacteria", size))
    ways = [
        ("MONOCHROME2", 8, "plain", "uncompressed"),
        ("MONOCHROME1", 12, "window", "uncompressed"),
        ("MONOCHROME2", 12, "lut", "rle"),
        ("MONOCHROME2", 16, "rescaled", "jpeg2000"),
        ("MONOCHROME2", 8, "plain", "rle"),
    ]
    return [dicom_of(grey, *way) for way in ways]
