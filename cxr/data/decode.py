"""Decodes image files (JPEG, PNG, DICOM) to square greyscale arrays."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cxr.data import dicom
from cxr.data.depth import FULL
from cxr.data.jpeg import has_too_many_scans

UInt8 = npt.NDArray[np.uint8]
MAX_PIXELS = 60_000_000  # a 1300x900 X-ray has 1.2 million; the largest detectors have about 20 million
MIN_SIDE = 32
FORMATS = ("JPEG", "PNG")


class ImageError(ValueError):
    """The bytes are not a usable image; the message is the reason."""


def decode_gray(
    data: bytes, size: int, resize: str, depth: int = FULL, named_dicom: bool = False
) -> tuple[UInt8, tuple[int, int, str]]:
    """Encoded bytes -> (uint8 [size, size], original (width, height, mode)).

    Greyscale by ITU-R 601 luma (as in PIL), bilinear resizing with antialiasing; transparent pixels become black; EXIF
    orientation is applied. 16-bit grey is scaled to 8 bits from its lowest `depth` bits. DICOM is recognised by its
    preamble, without one only if `named_dicom`; see `cxr.data.dicom.decode`. Raises `ImageError` for images that cannot
    be decoded, hold more than `depth` bits, have a side below 32 pixels or more than 60 million pixels.
    """
    if named_dicom or dicom.is_dicom(data):
        return _decode_dicom(data, size, resize)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            shape = (image.width, image.height, image.mode)
            check_shape(*shape)
            _check_scans(data, image)
            return square_gray(ImageOps.exif_transpose(image), size, resize, depth), shape
    except (ImageError, MemoryError):  # running out of memory does not make the image bad
        raise
    except Exception as error:  # parsers raise many types of error on malformed bytes
        raise ImageError(_reason(data, error)) from error


def _decode_dicom(data: bytes, size: int, resize: str) -> tuple[UInt8, tuple[int, int, str]]:
    try:
        header = dicom.read_header(data)
        shape = (header.width, header.height, header.mode)
        check_shape(*shape)
        return _square(Image.fromarray(dicom.decode(data, header)), size, resize), shape
    except dicom.DicomError as error:
        raise ImageError(str(error) if data else "zero bytes") from error


def pixels_of(data: bytes) -> int:
    """Width times height of an encoded image, from its header. Raises `ImageError` as `decode_gray`."""
    try:
        if dicom.is_dicom(data):
            header = dicom.read_header(data)
            width, height, mode = header.width, header.height, header.mode
        else:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height, mode = image.width, image.height, image.mode
        check_shape(width, height, mode)
        return width * height
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(_reason(data, error)) from error


def largest_value(data: bytes) -> int:
    """The largest value of an encoded grey image of 16 bits. Raises `ImageError` as `decode_gray`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_shape(image.width, image.height, image.mode)
            return int(np.asarray(image).max())
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(_reason(data, error)) from error


def square_gray(image: Image.Image, size: int, resize: str, depth: int = FULL) -> UInt8:
    """A decoded image of any mode -> uint8 [size, size], grey."""
    return _square(_to_gray(image, depth), size, resize)


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "zero bytes"
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or DICOM file"
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_shape(width: int, height: int, mode: str) -> None:
    """Raise `ImageError` for an image that is too small, too large, or of unknown value range."""
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{width}x{height}: smaller than {MIN_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height}: more than {MAX_PIXELS:,} pixels")
    if mode in ("I", "F"):
        raise ImageError(f"mode {mode}: 32-bit values of unknown range; convert it to 8 or 16 bit grey")


def _check_scans(data: bytes, image: Image.Image) -> None:
    if image.format != "PNG" and has_too_many_scans(data, image.width * image.height):
        raise ImageError(f"{image.width}x{image.height}: a JPEG of too many scans; save it as a baseline JPEG or a PNG")


def _to_gray(image: Image.Image, depth: int) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(np.asarray(image), depth))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("L")
    return image.convert("L") if image.mode in ("L", "RGB") else image.convert("RGB").convert("L")


def _scaled(values: npt.NDArray[np.uint16], depth: int) -> UInt8:
    """Values of `depth` bits -> 8 bits."""
    white = (1 << depth) - 1
    if values.max() > white:
        raise ImageError(f"16-bit grey with values up to {values.max()}, more than {depth} bits; see --depth")
    return (values.astype(np.uint32) * 255 // white).astype(np.uint8)


def _square(image: Image.Image, size: int, resize: str) -> UInt8:
    if resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    elif resize == "pad":
        image = ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color=0)
    else:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)
