"""Does a radiograph get the same prediction as DICOM as it gets as JPEG?

    uv run python experiments/dicom_check.py --data-dir KAGGLE --model models:/cxr-pneumonia@champion

Images are written as DICOM in every combination of photometric interpretation, bits stored,
compression and look (no VOI transformation, a window, a VOI LUT, a rescaling), and predicted from the bytes of both.
The table holds the largest and the mean difference in probability by combination. Exit code 1 if any is above 0.01.
Result in LOG.md: "2026-11-26: other sources, DICOM made of real JPEGs, other backbones".
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

from cxr.data.kaggle import find_root, index_folder
from cxr.serving.predictor import Predictor
from cxr.tracking.registry import load

TOLERANCE = 0.01
NAMES = ("photometric", "bits", "look", "syntax")
Pixels = npt.NDArray[np.uint16]
PHOTOMETRIC, BITS = ("MONOCHROME2", "MONOCHROME1"), (8, 12, 16)
LOOKS, SYNTAXES = ("plain", "window", "lut", "rescaled"), ("uncompressed", "rle", "jpeg2000")


def dicom_of(image: Image.Image, photometric: str, bits: int, look: str, syntax: str) -> bytes:
    """An 8-bit grey image as a DICOM file that a viewer shows as the same."""
    top = (1 << bits) - 1
    pixels = np.rint(np.asarray(image) * (top / 255)).astype(np.uint16)
    pixels = top - pixels if photometric == "MONOCHROME1" else pixels
    if look == "window" and bits > 8:  # the lower half of the range, as a detector with headroom stores it
        pixels //= 2
    ds = _described(pixels, photometric, bits)
    for name, value in _look(look, bits).items():
        setattr(ds, name, value)
    _set_pixels(ds, pixels.astype(np.uint8 if bits == 8 else np.uint16), syntax)
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _described(pixels: Pixels, photometric: str, bits: int) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = ComputedRadiographyImageStorage, generate_uid(), "CR"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, photometric, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 if bits == 8 else 16, bits, bits - 1
    return ds


def _look(look: str, bits: int) -> dict[str, Any]:
    """The elements that describe how stored values are shown."""
    size = 1 << bits
    if look == "window":
        width = size / 2 if bits > 8 else size
        return {"WindowCenter": [width / 2, 1], "WindowWidth": [width, 1]}
    if look == "rescaled":
        return {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": size - 100, "WindowWidth": 2 * size}
    if look == "lut":
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [size % (1 << 16), 0, 16])
        item.add_new("LUTData", "OW", np.rint(np.linspace(0, 65535, size)).astype("<u2").tobytes())
        return {"VOILUTSequence": [item]}
    return {}


def _set_pixels(ds: Dataset, pixels: npt.NDArray[Any], syntax: str) -> None:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 else "OW"
    if syntax == "rle":
        ds.compress(RLELossless, generate_instance_uid=False)
    elif syntax == "jpeg2000":
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True)
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.PixelData = encapsulate([buffer.getvalue()])
        ds["PixelData"].VR = "OB"


def rows(predictor: Predictor, files: list[Path], syntaxes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A row for each combination: photometric, bits, look, syntax, largest and mean difference in probability."""
    expected = predictor.predict(predictor.read_files(files))["probability"]
    images = [Image.open(file).convert("L") for file in files]
    for photometric, bits, look, syntax in product(PHOTOMETRIC, BITS, LOOKS, syntaxes):
        prepared = [predictor.prepare(dicom_of(image, photometric, bits, look, syntax)) for image in images]
        gaps = (predictor.predict(prepared)["probability"] - expected).abs()
        names = dict(zip(NAMES, (photometric, bits, look, syntax), strict=True))
        yield {**names, "largest": gaps.max(), "mean": gaps.mean()}


def in_turn(predictor: Predictor, files: list[Path], syntaxes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A row for each image, which is written in one combination, the next image in the next."""
    every = list(product(PHOTOMETRIC, BITS, LOOKS, syntaxes))
    for start in range(0, len(files), len(every)):
        chosen = files[start : start + len(every)]
        expected = predictor.predict(predictor.read_files(chosen))["probability"]
        written = [dicom_of(Image.open(file).convert("L"), *names) for file, names in zip(chosen, every, strict=False)]
        gaps = (predictor.predict([predictor.prepare(data) for data in written])["probability"] - expected).abs()
        for names, gap in zip(every, gaps, strict=False):
            yield dict(zip(("photometric", "bits", "look", "syntax"), names, strict=True)) | {
                "largest": gap,
                "mean": gap,
            }


@click.command()
@click.option("--data-dir", required=True, help="folder in the Kaggle layout")
@click.option("--model", default="models:/cxr-pneumonia@champion", show_default=True, help="URI of a model")
@click.option("--images", default=20, show_default=True, help="images, of all splits if there are no more in test")
@click.option("--syntaxes", default=",".join(SYNTAXES), show_default=True, help="how the pixels are encoded")
@click.option("--each", is_flag=True, help="every image once, the combinations in turn")
@click.option("--out", type=click.Path(path_type=Path), help="CSV file for the table")
def main(data_dir: str, model: str, images: int, syntaxes: str, each: bool, out: Path | None) -> None:
    """Compare predictions of DICOM and JPEG."""
    root = find_root(data_dir)
    table = index_folder(root)
    test = table.loc[table["official"] == "test", "path"]
    paths = (test if images <= len(test) else table["path"]).sample(images, random_state=0)
    files = [root / path for path in (table["path"] if each else paths)]
    found = pd.DataFrame((in_turn if each else rows)(load(model), files, tuple(syntaxes.split(","))))
    if each:
        images = len(found)
        found = found.groupby(list(NAMES), sort=False).agg({"largest": "max", "mean": "mean"}).reset_index()
    click.echo(found.to_string(index=False, float_format="%.5f"))
    click.echo(f"{len(found)} combinations of {images} images, largest difference {found['largest'].max():.5f}")
    if out:
        found.to_csv(out, index=False)
    sys.exit(int(found["largest"].max() > TOLERANCE))


if __name__ == "__main__":
    main()
