"""The frame of a JPEG, and whatever else its bytes are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from dicoms import compressed, encoded, radiograph
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1

from cxr.data import dicom
from cxr.data.decode import ImageError, decode_gray
from cxr.data.jpeg import Frame


def jpeg(width: int = 80, height: int = 64, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_the_frame_tells_size_bits_and_components() -> None:
    assert Frame.of(jpeg()) == Frame(80, 64, 8, 1)
    assert Frame.of(jpeg(33, 40, "RGB")) == Frame(33, 40, 8, 3)


@given(st.binary(max_size=60))
def test_other_bytes_have_no_frame_or_one_and_never_hang(data: bytes) -> None:
    for each in (data, b"\xff\xd8" + data, jpeg()[: len(data)] + data):
        assert Frame.of(each) is None or isinstance(Frame.of(each), Frame)


@pytest.mark.parametrize(
    ("rows", "columns", "frame"), [(32, 80, jpeg()), (64, 80, jpeg(mode="RGB")), (64, 80, b"\xff\xd8")]
)
def test_a_frame_that_is_not_what_the_header_tells_never_reaches_gdcm(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, frame: bytes
) -> None:
    """GDCM ends the process if a frame gives more bytes than it has allocated."""
    ds = compressed(radiograph(np.zeros((64, 80), np.uint8)), "jpeg")
    ds.Rows, ds.Columns, ds.PixelData = rows, columns, encapsulate([frame])
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    monkeypatch.setattr(dicom, "_plugin", lambda header: "gdcm")
    with pytest.raises(ImageError, match="not of the size that its header tells"):
        decode_gray(encoded(ds), 32, "squash")
