"""DICOM radiographs made of grey images, with a planted name, id and date."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    MediaStorageDirectoryStorage,
    RLELossless,
    generate_uid,
)

NAME, NUMBER, DATE = "Planted^Penelope", "PLANTED-4711", "19531224"
SECRETS = (NAME, NUMBER, DATE, "Penelope")


def radiograph(pixels: npt.NDArray[Any], bits: int = 8, **elements: Any) -> Dataset:
    """A CR image of these stored values [height, width], with further elements by keyword."""
    wide = 8 if bits <= 8 else 16
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = ComputedRadiographyImageStorage, generate_uid(), "CR"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.StudyDate = NAME, NUMBER, DATE, DATE
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = wide, bits, bits - 1, 0
    for name, value in elements.items():
        setattr(ds, name, value)
    kind = "i" if ds.PixelRepresentation else "u"
    ds.PixelData = pixels.astype(f"<{kind}{wide // 8}").tobytes()
    ds["PixelData"].VR = "OB" if wide == 8 else "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def compressed(ds: Dataset, syntax: str) -> Dataset:
    """The image compressed as `rle`, `jpeg2000` (lossless) or `jpeg` (quality 95)."""
    if syntax == "rle":
        ds.compress(RLELossless, generate_instance_uid=False)
        return ds
    kind = {"jpeg2000": JPEG2000Lossless, "jpeg": JPEGBaseline8Bit}[syntax]
    pixels = np.frombuffer(ds.PixelData, "<u2" if ds.BitsAllocated == 16 else "u1").reshape(ds.Rows, ds.Columns)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 95} if syntax == "jpeg" else {"no_jp2": True}
    Image.fromarray(pixels).save(buffer, "JPEG" if syntax == "jpeg" else "JPEG2000", **options)
    ds.PixelData = encapsulate([buffer.getvalue()])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = kind
    return ds


def lut(entries: npt.ArrayLike, first: int = 0, bits: int = 8) -> list[Dataset]:
    """A LUT sequence of one item."""
    values = np.asarray(entries)
    item = Dataset()
    item.LUTDescriptor = [len(values) % (1 << 16), first, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = values.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    return [item]


def encoded(ds: Dataset) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicomdir() -> bytes:
    """A directory of other files."""
    ds = radiograph(np.zeros((1, 1)))
    del ds.PixelData, ds.Rows
    ds.SOPClassUID = MediaStorageDirectoryStorage
    return encoded(ds)


def as_dicoms(source: Path, target: Path) -> Path:
    """A folder in the Kaggle layout with the JPEGs of another as DICOM files; each patient has an id of its own."""
    for number, file in enumerate(sorted(source.glob("*/*/*.jpeg"))):
        folder = target / file.relative_to(source).parent
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(Image.open(file).convert("L"))
        ds = radiograph(pixels, PatientID=f"{NUMBER}-{file.stem.rsplit('_', 1)[0].rsplit('-', 1)[0]}")
        (folder / f"{NAME}-{number}.dcm").write_bytes(encoded(ds))
    return target
