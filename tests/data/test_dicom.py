"""DICOM radiographs: pixels as a viewer shows them, refusals by name, and nothing from a header in any message."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import NUMBER, SECRETS, compressed, dicomdir, encoded, lut, radiograph
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from cxr.data import dicom
from cxr.data.decode import ImageError, decode_gray
from cxr.data.phantoms import phantom

CHEST = phantom(np.random.default_rng(0), "normal", 96)


def shown(ds: Dataset) -> dicom.UInt8:
    data = encoded(ds)
    return dicom.decode(data, dicom.read_header(data))


def bundled(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path, f"{name} is in the package pydicom-data"
    return Path(path).read_bytes()


def decoded(name: str) -> dicom.UInt8:
    data = bundled(name)
    with dicom.quiet():
        return dicom.decode(data, dicom.read_header(data))


def outcome(data: bytes) -> str:
    """The reason why bytes are refused; empty if they are not."""
    try:
        decode_gray(data, 32, "squash", named_dicom=True)
    except ImageError as error:
        return str(error)
    return ""


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as raised, dicom.quiet():
        decode_gray(data, 32, "squash", named_dicom=True)
    return str(raised.value)


def test_a_real_radiograph_is_the_same_uncompressed_and_as_jpeg_2000() -> None:
    plain, packed = decoded("RG1_UNCR.dcm").astype(int), decoded("RG1_J2KR.dcm").astype(int)
    assert plain.shape == (1955, 1841)
    assert np.abs(plain - packed).max() <= 1
    spine, lung = plain[900:1100, 880:960].mean(), plain[500:600, 560:700].mean()
    assert spine > lung + 40  # bones are white, although the file is MONOCHROME1


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_bigendian", "MR_small_jp2klossless", "MR_small_implicit"])
def test_the_transfer_syntax_does_not_change_the_image(name: str) -> None:
    assert np.array_equal(decoded(f"{name}.dcm"), decoded("MR_small.dcm"))


@pytest.mark.parametrize("bits", [8, 10, 12, 15, 16])
@pytest.mark.parametrize("syntax", ["plain", "rle", "jpeg2000"])
def test_an_image_of_any_depth_is_that_of_eight_bits(bits: int, syntax: str) -> None:
    full = np.rint(CHEST / 255 * ((1 << bits) - 1)).astype(np.uint16 if bits > 8 else np.uint8)
    ds = radiograph(full, bits)
    assert np.abs(shown(ds if syntax == "plain" else compressed(ds, syntax)).astype(int) - CHEST).max() <= 1


def test_jpeg_baseline() -> None:
    assert np.abs(shown(compressed(radiograph(CHEST), "jpeg")).astype(int) - CHEST).mean() < 2


@pytest.mark.filterwarnings("ignore:.*pixel representation")
@given(st.integers(2, 16), st.booleans(), st.integers(0, 2**32 - 1))
def test_monochrome1_is_inverted_within_the_range_of_the_output(bits: int, window: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, random.integers(1, 1 << bits), (8, 8), endpoint=True)
    more: dict[str, Any] = {"WindowCenter": [1 << bits - 1, 7], "WindowWidth": [1 << bits, 9]} if window else {}
    two = shown(radiograph(pixels, bits, **more)).astype(int)
    one = shown(radiograph(pixels, bits, PhotometricInterpretation="MONOCHROME1", **more)).astype(int)
    assert np.abs(one + two - 255).max() <= 1


def test_the_first_window_is_applied_after_the_rescaling() -> None:
    pixels = np.array([[0, 100, 200, 300, 4095]] * 5)
    ds = radiograph(pixels, 12, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[300.5, 5], WindowWidth=[401, 5])
    assert shown(ds)[0].tolist() == [0, 0, 128, 255, 255]


def test_a_negative_slope_inverts() -> None:
    pixels = np.arange(256).reshape(16, 16)
    plain = radiograph(pixels, RescaleSlope=-1, RescaleIntercept=255)
    windowed = radiograph(pixels, RescaleSlope=-1, RescaleIntercept=255, WindowCenter=128, WindowWidth=256)
    for ds in (plain, windowed):
        assert np.abs(shown(ds).astype(int) - (255 - pixels)).max() <= 1


def test_a_lut_comes_before_a_window() -> None:
    ds = radiograph(np.arange(4096).reshape(64, 64), 12, WindowCenter=1, WindowWidth=1)
    ds.VOILUTSequence = lut(np.arange(4096) // 16)  # 8-bit entries of a 12-bit input
    assert np.array_equal(shown(ds), np.arange(4096).reshape(64, 64) // 16)


def test_a_modality_lut_and_the_ends_of_a_lut() -> None:
    ds = radiograph(np.arange(256).reshape(16, 16))
    ds.ModalityLUTSequence = lut(1000 + np.arange(256), bits=16)
    ds.VOILUTSequence = lut([0, 128, 255], first=1100)
    assert shown(ds).ravel()[[0, 100, 101, 102, 255]].tolist() == [0, 0, 128, 255, 255]


def test_sigmoid_windows() -> None:
    ds = radiograph(np.arange(256).reshape(16, 16), WindowCenter=128, WindowWidth=64, VOILUTFunction="SIGMOID")
    grey = shown(ds).ravel().astype(int)
    assert (np.diff(grey) >= 0).all()
    assert (grey[0], grey[128], grey[255]) == (0, 128, 255)


def test_bits_above_those_stored_are_not_pixels() -> None:
    overlay = CHEST.astype(np.uint16) * 16 | 0xA000
    ds = radiograph(overlay, 12, BitsAllocated=16)
    assert np.abs(shown(ds).astype(int) - CHEST.astype(int) * 16 * 255 / 4095).max() <= 1


def test_signed_pixels() -> None:
    pixels = CHEST.astype(np.int16) - 128
    ds = radiograph(pixels, 12, PixelRepresentation=1, WindowCenter=0, WindowWidth=256)
    assert np.abs(shown(ds).astype(int) - CHEST).max() <= 1


def test_twelve_bits_that_claim_to_be_sixteen_are_not_black() -> None:
    assert shown(radiograph(CHEST.astype(np.uint16) * 16, 16)).max() > 200
    assert shown(radiograph(CHEST.astype(np.int16) * 16, 16, PixelRepresentation=1)).max() > 200


def without(*names: str) -> Dataset:
    ds = radiograph(CHEST)
    for name in names:
        delattr(ds, name)
    return ds


def deflated() -> Dataset:
    ds = radiograph(CHEST)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return ds


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (deflated, "deflated"),
        (lambda: without("PixelData"), "no pixels"),
        (lambda: without("Rows", "PixelData"), "without an image"),
        (lambda: without("BitsStored"), "describes the pixels"),
        (lambda: radiograph(CHEST, NumberOfFrames=2), "several frames"),
        (lambda: radiograph(CHEST, PhotometricInterpretation="PALETTE COLOR"), "colour"),
        (lambda: radiograph(np.stack([CHEST] * 3, 2), SamplesPerPixel=3, PhotometricInterpretation="RGB"), "colour"),
        (lambda: radiograph(CHEST, PresentationIntentType="FOR PROCESSING"), "FOR PROCESSING"),
        (lambda: radiograph(CHEST, Rows=50_000, Columns=50_000), "50000x50000: more than 60,000,000 pixels"),
        (lambda: radiograph(CHEST, Rows=200), "truncated"),
        (lambda: radiograph(CHEST, HighBit=15, BitsAllocated=16), "bits stored"),
        (lambda: radiograph(CHEST, WindowCenter=1, WindowWidth=0), "window cannot be applied"),
    ],
)
def test_what_is_no_single_grey_image_is_refused_by_name(make: Callable[[], Dataset], says: str) -> None:
    assert says in reason(encoded(make()))


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "zero bytes"), (dicomdir(), "a DICOMDIR"), (b"a text, no image\n" * 50, "not a DICOM file")],
    ids=["empty", "directory", "text"],  # each process makes other bytes
)
def test_other_files_named_as_dicom(data: bytes, says: str) -> None:
    assert says in reason(data)


def test_a_header_larger_than_a_file_can_hold() -> None:
    data = encoded(radiograph(CHEST))
    with dicom.quiet():
        ds = dcmread(io.BytesIO(data))
        ds["Rows"].VR = ds["Columns"].VR = "UL"
        ds.Rows = ds.Columns = 100_000
    assert reason(encoded(ds)) == "100000x100000: more than 60,000,000 pixels"


def test_a_truncated_file_is_refused_wherever_it_ends() -> None:
    for syntax in ("plain", "rle", "jpeg2000"):
        ds = radiograph(CHEST.astype(np.uint16) * 16, 12)
        data = encoded(ds if syntax == "plain" else compressed(ds, syntax))
        for share in (0.01, 0.03, 0.05, 0.1, 0.3, 0.5, 0.9):
            assert reason(data[: int(share * len(data))])


@given(st.integers(140, 1200), st.integers(0, 255))
def test_a_spoilt_header_raises_nothing_else_and_quotes_nothing(position: int, value: int) -> None:
    data = bytearray(encoded(radiograph(CHEST, 12, BitsAllocated=16)))
    data[position] = value
    with dicom.quiet():
        message = outcome(bytes(data))
    assert not [secret for secret in SECRETS if secret in message]


@pytest.mark.parametrize("element", ["PhotometricInterpretation", "NumberOfFrames", "VOILUTFunction", "WindowWidth"])
def test_no_header_value_in_messages_warnings_or_logs(element: str, caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(radiograph(CHEST, WindowCenter=128, WindowWidth=256, NumberOfFrames=1, VOILUTFunction="LINEAR"))
    with dicom.quiet():
        ds = dcmread(io.BytesIO(data))
        ds[element]._value = SECRETS[1] if element != "WindowWidth" else None
        raw = encoded(ds) if element != "NumberOfFrames" else data.replace(b"\x28\x00\x08\x00IS\x02\x001 ", NUMBERED)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with dicom.quiet():
            message = outcome(raw)
    assert SECRETS[1] not in message + caplog.text
    assert seen == []


NUMBERED = b"\x28\x00\x08\x00IS\x0c\x00" + NUMBER.encode()


def test_jpeg_lossless_needs_an_extra_decoder_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoded("JPGLosslessP14SV1_1s_1f_8b.dcm").std() > 10
    assert np.array_equal(decoded("MR_small_jpeg_ls_lossless.dcm"), decoded("MR_small.dcm"))
    monkeypatch.setattr(dicom, "_DECODERS", ("pillow",))
    for name in ("JPGLosslessP14SV1_1s_1f_8b.dcm", "MR_small_jpeg_ls_lossless.dcm"):
        assert "needs python-gdcm; install it (`uv sync --extra dicom`)" in reason(bundled(name))


def test_twelve_bit_jpeg_is_refused_by_name() -> None:
    assert "JPEG Extended of 12 bits" in reason(bundled("JPGExtended.dcm"))


def test_an_unknown_compression_is_not_quoted() -> None:
    ds = radiograph(CHEST)
    data = encoded(ds).replace(b"1.2.840.10008.1.2.1\0", b"1.2.3.19531224.1.1.1")
    assert "of an unknown kind" in reason(data)


def test_a_patient_is_a_keyed_hash_of_id_and_issuer(tmp_path: Path) -> None:
    data = encoded(radiograph(CHEST))
    (tmp_path / "a").write_bytes(data)
    patient = dicom.patient_of(data, b"key")
    assert patient == dicom.patient_of(tmp_path / "a", b"key")
    assert len(patient or "") == 16
    others = [radiograph(CHEST, PatientID="another"), radiograph(CHEST, IssuerOfPatientID="elsewhere")]
    hashes = {patient, dicom.patient_of(data, b"other key"), *(dicom.patient_of(encoded(ds), b"key") for ds in others)}
    assert len(hashes) == 4
    for unknown in (encoded(radiograph(CHEST, PatientID="  ")), encoded(without("PatientID")), b"text", data[:150]):
        assert dicom.patient_of(unknown, b"key") is None
    assert dicom.patient_of(tmp_path / "missing", b"key") is None


def test_dicom_bytes_are_recognised_by_content_and_decoded_as_the_png() -> None:
    buffer = io.BytesIO()
    Image.fromarray(CHEST).save(buffer, "PNG")
    expected = decode_gray(buffer.getvalue(), 64, "pad")[0]
    image, shape = decode_gray(encoded(radiograph(CHEST)), 64, "pad")
    assert np.array_equal(image, expected)
    assert shape == (96, 96, "MONOCHROME2 8-bit")


def test_a_frame_larger_than_the_header_tells_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    ds = compressed(radiograph(CHEST), "jpeg2000")
    ds.Rows, ds.Columns = 64, 64
    monkeypatch.setattr(dicom, "get_decoder", _idle)
    with pytest.raises(dicom.DicomError, match="not of the size that its header tells"):
        shown(ds)


def _idle(syntax: UID) -> Any:
    """The decoder of a syntax, less what gives pixels."""
    decoder = get_decoder(syntax)
    return type("Idle", (), {"is_encapsulated": True, "available_plugins": decoder.available_plugins})()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_jpeg_of_too_many_scans_is_refused(wrapped: bool) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((1000, 1000), np.uint8)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    bomb = data[:-2] + scan * 2100 + data[-2:]
    if wrapped:
        ds = compressed(radiograph(np.zeros((1000, 1000), np.uint8)), "jpeg")
        ds.PixelData = encapsulate([bomb])
        bomb = encoded(ds)
    with pytest.raises(ImageError, match="too many scans"):
        decode_gray(bomb, 32, "squash")
    assert decode_gray(data, 32, "squash")[1] == (1000, 1000, "L")
