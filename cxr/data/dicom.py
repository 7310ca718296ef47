"""DICOM radiographs: bytes -> grey pixels as a viewer shows them, and a patient as a keyed hash.

No value from a header is put into a message: any element may hold a name. pydicom's own messages and warnings do, so
its errors are replaced by fixed reasons and its warnings are switched off.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_rescale, apply_windowing
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
)

from cxr.data.depth import FULL, fewest_bits
from cxr.data.jpeg import Frame, has_too_many_scans

SUFFIXES = {".dcm", ".dicom"}
HEAD = 132  # bytes: a preamble of any content, then `DICM`
_DIRECTORY = "1.2.840.10008.1.3.10"  # the SOP class of a DICOMDIR
_DECODERS = ("pillow", "gdcm")  # in the order in which they are tried; others that happen to be installed are not used
_PIXEL_TAGS = [
    *("SOPClassUID", "PresentationIntentType", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
]
_OTHER_SIZE = "its pixels are not of the size that its header tells"
_PATIENT_TAGS = ["PatientID", "IssuerOfPatientID"]
UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
T = TypeVar("T")

# A filter, because a program's own set-up of logging may reset levels, handlers and propagation.
logging.getLogger("pydicom").addFilter(lambda record: False)


class DicomError(ValueError):
    """The bytes are not a usable DICOM radiograph; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Header:
    """What must be known before the pixels are read: width and height in pixels, how grey is meant, and the rest."""

    width: int
    height: int
    photometric: str
    bits: int
    signed: bool
    syntax: UID
    elements: Dataset

    @property
    def lowest(self) -> int:
        """The lowest value that the bits stored can hold."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def mode(self) -> str:
        """The photometric interpretation and the bits stored, such as `MONOCHROME2 12-bit`."""
        return f"{self.photometric} {self.bits}-bit"


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes is DICOM by its preamble."""
    return head[128:HEAD] == b"DICM"


def has_dicom_name(path: str | Path) -> bool:
    """Whether a file is DICOM by its name, which old files without a preamble need."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def head_of(path: Path) -> bytes:
    """The beginning of a file, for `is_dicom`. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return file.read(HEAD)


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings, which quote header values.

    Around a group of threads rather than in each: the filters belong to the process.
    """
    with warnings.catch_warnings(action="ignore"):
        yield


def read_header(data: bytes) -> Header:
    """The header of a file, without its pixels. Raises `DicomError` for what is no radiograph of one grey frame."""
    syntax = _reading("not a DICOM file, or its header is damaged", lambda: _syntax(io.BytesIO(data)))
    if syntax == DeflatedExplicitVRLittleEndian:  # of unknown size until it is inflated
        raise DicomError("a deflated DICOM file; save it uncompressed, or as RLE, JPEG or JPEG 2000")
    elements = _reading("not a DICOM file, or its header is damaged", lambda: _read(io.BytesIO(data), _PIXEL_TAGS))
    return _reading("its header lacks or spoils what describes the pixels", lambda: _checked(elements, syntax))


def decode(data: bytes, header: Header) -> UInt8:
    """The pixels of a file, uint8 [height, width], 0 black to 255 white.

    Modality LUT or rescaling, then VOI LUT or else the first window (PS3.3 C.11), then MONOCHROME1 is inverted within
    the range of the output. Without LUT and window the VOI transformation is the identity, so black and white are the
    ends of the range of the bits stored, as the standard has it; scaling each image by its own extremes, as
    torchxrayvision does, would make one exposure look like another. Where the header claims all 16 bits, it is rather
    that of the fewest bits (8, 10, 12, 14, 16) that hold the image. Raises `DicomError`.
    """
    whole = _reading("truncated, or damaged", lambda: _read(io.BytesIO(data), _PIXEL_TAGS, whole=True))
    if "PixelData" not in whole:
        raise DicomError("holds no pixels (no element PixelData), or is truncated before them")
    stored = _reading("its pixels are truncated or damaged", lambda: _pixels(whole, header))
    table = _reading(
        "its LUT or window cannot be applied", lambda: _table(header, int(stored.min()), int(stored.max()))
    )
    return table[stored - header.lowest]


def patient_of(source: Path | bytes, key: bytes) -> str | None:
    """The patient of a DICOM file: 16 hex digits, HMAC-SHA256 of PatientID and IssuerOfPatientID under `key`.

    None if the file has no PatientID or cannot be read. Only the header is read. Call it within `quiet`.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            if _syntax(file) == DeflatedExplicitVRLittleEndian:
                return None
            file.seek(0)
            elements = _read(file, _PATIENT_TAGS)
            number, issuer = (str(elements.get(tag) or "").strip() for tag in _PATIENT_TAGS)
    except Exception:  # whatever a malformed header raises; decoding reports it
        return None
    return hmac.new(key, f"{issuer}\0{number}".encode(), hashlib.sha256).hexdigest()[:16] if number else None


def decoders() -> str:
    """pydicom's version and the extra decoders that are installed: pixels decoded by others are not taken over."""
    return f"pydicom{pydicom.__version__}" + ("-gdcm" if importlib.util.find_spec("gdcm") else "")


def _reading(reason: str, step: Callable[[], T]) -> T:
    """The result of `step`; `DicomError` with a reason that quotes nothing if it fails."""
    try:
        return step()
    except (DicomError, MemoryError):  # running out of memory does not make the image bad
        raise
    except Exception as error:  # pydicom and its decoders raise many types of error on malformed bytes
        raise DicomError(f"{reason} ({type(error).__name__})") from error


def _syntax(file: BinaryIO) -> UID:
    """The transfer syntax, from the file meta information alone; implicit little endian where there is none."""
    read_preamble(file, force=True)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("MediaStorageSOPClassUID") == _DIRECTORY:
        raise DicomError("a DICOMDIR, the directory of other files; pass the images that it lists")
    return UID(str(meta.get("TransferSyntaxUID") or ImplicitVRLittleEndian))


def _read(file: BinaryIO, tags: list[str], whole: bool = False) -> Dataset:
    return pydicom.dcmread(file, stop_before_pixels=not whole, force=True, specific_tags=list(tags))


def _checked(elements: Dataset, syntax: UID) -> Header:
    """Raises `DicomError` by name for what is no single grey image for presentation."""
    if not elements.get("Rows") or not elements.get("Columns"):
        known = "SOPClassUID" in elements
        raise DicomError("a DICOM file without an image" if known else "not a DICOM file")
    if int(elements.get("NumberOfFrames") or 1) != 1:
        raise DicomError("several frames; save the radiograph as a file of its own")
    photometric = str(elements.PhotometricInterpretation)
    if int(elements.get("SamplesPerPixel") or 1) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DicomError("colour; only MONOCHROME1 and MONOCHROME2 are radiographs")
    if elements.get("PresentationIntentType") == "FOR PROCESSING":
        raise DicomError("FOR PROCESSING, raw detector values; export the image FOR PRESENTATION")
    bits, high = int(elements.BitsStored), int(elements.get("HighBit") or elements.BitsStored - 1)
    if not 1 <= bits <= FULL or high != bits - 1:
        raise DicomError("bits stored above 16, or not the lowest bits; save it again with 8 to 16 bits")
    if syntax == ExplicitVRBigEndian and ("VOILUTSequence" in elements or "ModalityLUTSequence" in elements):
        raise DicomError("big endian with a LUT; save it little endian")
    signed = int(elements.PixelRepresentation) == 1
    return Header(int(elements.Columns), int(elements.Rows), photometric, bits, signed, syntax, elements)


def _pixels(whole: Dataset, header: Header) -> npt.NDArray[np.int32]:
    """The stored values [height, width]; what lies in bits above those stored (old overlays) is removed."""
    plugin = _plugin(header)
    if plugin:
        _check_frame(whole, header, plugin)
    array, _ = get_decoder(header.syntax).as_array(whole, decoding_plugin=plugin, raw=True)
    values = np.asarray(array).astype(np.int32) & ((1 << header.bits) - 1)
    if header.signed:
        values = np.where(values >> header.bits - 1, values - (1 << header.bits), values)
    if values.shape != (header.height, header.width):
        raise DicomError(_OTHER_SIZE)
    return values


def _check_frame(whole: Dataset, header: Header, plugin: str) -> None:
    """Raise `DicomError` for a compressed frame that is larger than the header tells, or of too many scans."""
    frame = get_frame(whole.PixelData, 0, number_of_frames=1)
    if has_too_many_scans(frame, header.width * header.height):
        raise DicomError("a JPEG of too many scans; save it uncompressed")
    if plugin == "pillow":
        with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as image:
            if image.size != (header.width, header.height):
                raise DicomError(_OTHER_SIZE)
    else:
        _check_jpeg(frame, header, int(whole.BitsAllocated))


def _check_jpeg(frame: bytes, header: Header, allocated: int) -> None:
    """Raise `DicomError` for a JPEG or JPEG-LS that is not what the header tells: GDCM ends the process if one gives
    more bytes than it has allocated, which no caller can catch."""
    told = Frame.of(frame)
    if told is None or (told.width, told.height, told.components) != (header.width, header.height, 1):
        raise DicomError(_OTHER_SIZE)
    if (told.bits > 8) != (allocated > 8):
        raise DicomError("its pixels have other bits than its header tells")


def _plugin(header: Header) -> str:
    """Which of pydicom's plugins decodes the pixels; empty for its own code. Raises `DicomError` if none can."""
    syntax = header.syntax
    name = syntax.name if syntax.name != str(syntax) else "of an unknown kind"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise DicomError(f"its compression ({name}) is not supported; save it uncompressed") from error
    if not decoder.is_encapsulated or "pydicom" in decoder.available_plugins:
        return ""
    if syntax == JPEGExtended12Bit and header.bits > 8:  # neither Pillow nor GDCM decodes it
        raise DicomError("its compression (JPEG Extended of 12 bits) is not supported; save it uncompressed")
    usable = [each for each in _DECODERS if each in decoder.available_plugins]
    if not usable:
        raise DicomError(
            f"its compression ({name}) needs python-gdcm; install it (`uv sync --extra dicom`) or save it uncompressed"
        )
    return usable[0]


def _table(header: Header, smallest: int, largest: int) -> UInt8:
    """The grey level of each value that the bits stored can hold, from the lowest: far fewer than there are pixels.

    `smallest` and `largest` are those in the image.
    """
    elements = header.elements
    stored = np.arange(header.lowest, header.lowest + (1 << header.bits))
    modality = _modality(stored, elements)
    if lut := elements.get("VOILUTSequence"):
        levels = _looked_up(modality, lut[0]) / _top(lut[0])
    elif elements.get("WindowCenter") is not None and elements.get("WindowWidth") is not None:
        levels = _windowed(modality, elements)
    else:
        used = modality[_used(header, smallest, largest)]
        levels = (modality - used.min()) / max(float(np.ptp(used)), 1e-12)
    levels = np.clip(levels, 0, 1)
    if header.photometric == "MONOCHROME1":
        levels = 1 - levels
    return np.rint(255 * levels).astype(np.uint8)


def _used(header: Header, smallest: int, largest: int) -> slice:
    """Which part of the table's values black and white are the ends of, where neither LUT nor window says it."""
    if header.bits < FULL:
        return slice(None)
    real = 1 << fewest_bits(max(largest, -smallest))
    low = -real if smallest < 0 else 0
    return slice(max(low - header.lowest, 0), real - header.lowest)


def _modality(stored: npt.NDArray[np.int64], elements: Dataset) -> Floats:
    if lut := elements.get("ModalityLUTSequence"):
        return _looked_up(stored.astype(np.float64), lut[0])
    return np.asarray(apply_rescale(stored, elements), np.float64)


def _looked_up(values: Floats, item: Dataset) -> Floats:
    """Values through a LUT. Not pydicom's `apply_voi`, whose index overflows if the entries have 8 bits."""
    count, first, bits = (int(each) for each in item.LUTDescriptor)
    count = count or 1 << 16
    if first >= 1 << 15 and values.min() < 0:  # a signed value read as an unsigned one
        first -= 1 << 16
    data: Any = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * count else np.uint8)
    entries: Floats = np.asarray(data, np.float64)[:count]
    if not len(entries) or not 1 <= bits <= FULL:
        raise DicomError("its LUT is empty or has more than 16 bits")
    index = np.clip(np.rint(values) - first, 0, len(entries) - 1)
    looked_up: Floats = entries[index.astype(np.int64)]
    return looked_up


def _top(item: Dataset) -> float:
    """The white end of a LUT's output range."""
    return float((1 << int(item.LUTDescriptor[2])) - 1)


def _windowed(values: Floats, elements: Dataset) -> Floats:
    """0 to 1 by the first window, as LINEAR, LINEAR_EXACT or SIGMOID. The ends of the range are what the window makes
    of values far outside, which holds for negative slopes, too."""
    with np.errstate(over="ignore"):
        black, white = apply_windowing(np.array([-1e12, 1e12]), elements)
        levels: Floats = np.asarray((apply_windowing(values, elements) - black) / (white - black))
    return levels
