"""Decoding of images, and the store that decodes each of them once."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr.data import store as module
from cxr.data.decode import ImageError, check_shape, decode_gray
from cxr.data.kaggle import digest_files
from cxr.data.store import Store, open_store
from cxr.errors import UserError
from cxr.storage import Cache, remove_folder

UInt8 = npt.NDArray[np.uint8]


def noise(height: int, width: int, *channels: int, seed: int = 0) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)


def ramp(height: int, width: int) -> UInt8:
    """A horizontal grey ramp, so that displaced pixels are detected."""
    return np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))


def encode(image: npt.NDArray[Any] | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes, size: int = 64, resize: str = "squash") -> UInt8:
    return decode_gray(data, size, resize)[0]


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def png_header(width: int, height: int) -> bytes:
    """A PNG header that declares a size, without pixels."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 0, 0, 0, 0])) + chunk(b"IDAT", zlib.compress(b"\0"))


# Decoding


def test_grey_of_the_requested_size_is_unchanged() -> None:
    image = noise(64, 64)
    decoded, shape = decode_gray(encode(image), 64, "squash")
    np.testing.assert_array_equal(decoded, image)
    assert shape == (64, 64, "L")


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_equal_channels_decode_to_the_same_bits_as_grey(resize: str) -> None:
    grey = noise(90, 130)
    np.testing.assert_array_equal(
        decode(encode(np.stack([grey] * 3, 2)), resize=resize), decode(encode(grey), resize=resize)
    )


def test_colour_becomes_itu_luma() -> None:
    colours = np.zeros((64, 64, 3), np.uint8)
    colours[:, :20, 0], colours[:, 20:40, 1], colours[:, 40:, 2] = 255, 255, 255
    assert [int(decode(encode(colours))[0, x]) for x in (0, 30, 63)] == [76, 150, 29]


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    deep = (ramp(64, 64).astype(np.uint16) * 257)[:, ::-1]
    np.testing.assert_array_equal(decode(encode(np.ascontiguousarray(deep))), ramp(64, 64)[:, ::-1])


@pytest.mark.parametrize("mode", ["1", "P", "LA", "CMYK", "RGBA"])
def test_other_modes_decode_to_equivalent_grey(mode: str) -> None:
    image = Image.fromarray(np.where(ramp(64, 64) > 127, 255, 0).astype(np.uint8)).convert("RGB").convert(mode)
    decoded = decode(encode(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert decoded[:, :28].max() < 10
    assert decoded[:, 36:].min() > 245


def test_transparent_pixels_become_black() -> None:
    image = np.full((64, 64, 4), 255, np.uint8)
    image[:, :20, 3], image[:, 20:40, 3] = 0, 128
    decoded = decode(encode(image))
    assert [int(decoded[0, x]) for x in (0, 30, 63)] == [0, 128, 255]


def test_a_transparent_palette_entry_is_black() -> None:
    image = Image.fromarray(np.full((64, 64), 1, np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    assert decode(encode(image)).min() == 255
    assert decode(encode(image, transparency=1)).max() == 0


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    turned = decode(encode(np.ascontiguousarray(ramp(64, 64)[:, ::-1]), "JPEG", exif=exif, quality=95))
    assert np.abs(turned.astype(int) - ramp(64, 64)).max() < 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"not an image at all", "not a JPEG, PNG or DICOM file"),
        (b"<html>404</html>" * 100, "not a JPEG, PNG or DICOM file"),
        (encode(noise(64, 64), "GIF"), "not a JPEG, PNG or DICOM file"),
        (encode(noise(64, 64), "JPEG")[:-900], "truncated"),
        (encode(noise(64, 64))[:-900], "truncated|incomplete|broken"),
        (encode(noise(1, 1)), "1x1: smaller than 32 pixels"),
        (encode(noise(500, 31)), "31x500: smaller than 32"),
        (encode(noise(64, 64).astype(np.float32).view(np.int32), "TIFF"), "not a JPEG, PNG or DICOM file"),
        (png_header(10_000, 8_000), "10000x8000: more than 60,000,000 pixels"),
        (png_header(60_000, 60_000), "pixels"),
    ],
    ids=["zero", "text", "html", "gif", "cut jpeg", "cut png", "1x1", "thin", "tiff", "large", "bomb"],
)
def test_an_unusable_image_is_rejected_with_the_reason(data: bytes, reason: str) -> None:
    with warnings.catch_warnings(action="ignore"), pytest.raises(ImageError, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_rejected_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="more than"):
        decode(png_header(7_000, 9_000))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_of_unknown_range_are_rejected(mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode}"):
        check_shape(64, 64, mode)


@settings(max_examples=150)
@given(st.sampled_from(["JPEG", "PNG"]), st.integers(0, 3000), st.binary(min_size=1, max_size=8))
def test_damaged_bytes_give_an_image_or_an_image_error(format: str, start: int, patch: bytes) -> None:
    data = bytearray(encode(noise(40, 40), format))
    start %= len(data)
    data[start : start + len(patch)] = patch
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ImageError):
        assert decode(bytes(data), 32).shape == (32, 32)


def test_running_out_of_memory_does_not_mark_an_image_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object) -> UInt8:
        raise MemoryError

    monkeypatch.setattr("cxr.data.decode.square_gray", exhausted)
    with pytest.raises(MemoryError):
        decode(encode(noise(64, 64)))


def test_squash_shows_the_whole_rectangle() -> None:
    squashed = decode(encode(ramp(40, 128)))
    assert squashed.shape == (64, 64)
    assert (int(squashed[0, 0]), int(squashed[0, -1])) == pytest.approx((0, 255), abs=4)


def test_crop_shows_the_centre_without_distortion() -> None:
    cropped = decode(encode(ramp(40, 120)), resize="crop")
    assert cropped.shape == (64, 64)
    assert (int(cropped[0, 0]), int(cropped[0, -1])) == pytest.approx((85, 170), abs=4)


@pytest.mark.parametrize("upright", [False, True])
def test_pad_shows_the_whole_image_without_distortion_between_black_bars(upright: bool) -> None:
    image = np.full((120, 60) if upright else (60, 120), 200, np.uint8)
    padded = decode(encode(image), resize="pad")
    padded = padded.T if upright else padded
    assert padded.shape == (64, 64)
    assert padded[:15].max() == padded[-15:].max() == 0
    assert padded[17:47].min() == 200


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (128, 64))
    assert np.abs(decode(encode(stripes), 32)[:, 2:-2].astype(int) - 127).max() <= 2


# The store


def make_files(folder: Path, count: int, start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{n}.png" for n in range(start, start + count)]
    for n, path in enumerate(paths, start):
        path.write_bytes(encode(noise(40, 48, seed=n)))
    return paths


def build(paths: list[Path], cache: Path) -> Store:
    return open_store(paths, digest_files(paths), 32, "squash", Cache(cache))


def folder_of(cache: Path) -> Path:
    """The folder of the only store."""
    (meta,) = cache.glob("store/*/*/meta.json")
    return meta.parent


def assert_right(store: Store, paths: list[Path]) -> None:
    for digest, path in zip(digest_files(paths), paths, strict=True):
        np.testing.assert_array_equal(store.images[store.rows[digest]], decode(path.read_bytes(), 32))
        assert store.shapes[digest] == (48, 40, "L")


def refuse_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "decode_gray", lambda *args: pytest.fail("decoded"))


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    calls: list[bytes] = []

    def counted(data: bytes, *how: Any) -> tuple[UInt8, tuple[int, int, str]]:
        calls.append(data)
        return decode_gray(data, *how)

    monkeypatch.setattr(module, "decode_gray", counted)
    return calls


def test_the_store_contains_every_image(tmp_path: Path, own_cache: Path) -> None:
    paths = make_files(tmp_path / "data", 5)
    store = build(paths, own_cache)
    assert store.images.shape == (5, 32, 32)
    assert not store.bad
    assert_right(store, paths)


def test_opening_an_existing_store_decodes_nothing(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(tmp_path / "data", 3)
    build(paths, own_cache)
    refuse_to_decode(monkeypatch)
    build(paths, own_cache)
    moved = [path.rename(path.with_name(f"moved-{path.name}")) for path in reversed(paths)]
    store = build(moved, own_cache)
    monkeypatch.undo()
    assert_right(store, moved)


def test_the_images_are_read_only(tmp_path: Path, own_cache: Path) -> None:
    images = build(make_files(tmp_path / "data", 1), own_cache).images
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_only_a_changed_file_is_decoded_again(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_files(tmp_path / "data", 5)
    build(paths, own_cache)
    paths[2].write_bytes(encode(noise(40, 48, seed=99)))
    calls = count_decoding(monkeypatch)
    store = build(paths, own_cache)
    assert calls == [paths[2].read_bytes()]
    assert_right(store, paths)


def test_a_different_size_or_resize_is_a_different_store(tmp_path: Path, own_cache: Path) -> None:
    paths = make_files(tmp_path / "data", 1)
    digests = digest_files(paths)
    for size, resize in ((32, "squash"), (48, "squash"), (32, "crop"), (32, "pad")):
        images = open_store(paths, digests, size, resize, Cache(own_cache)).images
        np.testing.assert_array_equal(images[0], decode(paths[0].read_bytes(), size, resize))
    assert len(list(own_cache.glob("store/*/*/images.u8"))) == 4


def test_rows_of_another_decoder_version_are_not_reused(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(tmp_path / "data", 3)
    monkeypatch.setattr(module, "_FORMAT", "of-old")
    build(paths, own_cache)
    monkeypatch.undo()
    calls = count_decoding(monkeypatch)
    build(paths, own_cache)
    assert len(calls) == 3


def test_identical_files_share_a_row(tmp_path: Path, own_cache: Path) -> None:
    paths = make_files(tmp_path / "data", 2)
    paths.append(Path(shutil.copy(paths[0], tmp_path / "data/copy.png")))
    store = build(paths, own_cache)
    assert len(store.images) == len(store.rows) == 2
    assert_right(store, paths)


def test_bad_files_are_listed_with_their_reasons_and_have_no_row(tmp_path: Path, own_cache: Path) -> None:
    paths = make_files(tmp_path / "data", 4)
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    paths[3].unlink()
    for _ in range(2):  # built, and read back
        store = build(paths, own_cache)
        empty, cut, good, gone = digest_files(paths)
        assert store.bad.keys() == {empty, cut, gone}
        assert store.bad[empty] == "zero bytes"
        assert store.bad[gone] == "No such file or directory"
        assert store.rows.keys() == {good}
        assert_right(store, paths[2:3])


def test_an_image_with_damaged_exif_is_kept(tmp_path: Path, own_cache: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description that is long enough to lie behind the directory"
    data = encode(ramp(64, 64), "JPEG", exif=exif)
    (tmp_path / "torn.jpg").write_bytes(data.replace(b"\x01\x0e\x00\x02\x00", b"\x01\x0e\x00\x02\x7f"))
    with pytest.warns(UserWarning, match="Tag data"):
        decode((tmp_path / "torn.jpg").read_bytes())
    store = build([tmp_path / "torn.jpg"], own_cache)  # without the warning, which is an error here
    np.testing.assert_array_equal(store.images[0], decode(data, 32))


def test_a_store_of_only_bad_files_is_empty(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"x")
    for _ in range(2):
        store = build([tmp_path / "x.png"], own_cache)
        assert (len(store.images), len(store.bad)) == (0, 1)


def test_a_file_changed_during_the_build_is_rejected_and_nothing_is_kept(tmp_path: Path, own_cache: Path) -> None:
    paths = make_files(tmp_path / "data", 2)
    digests = digest_files(paths)
    original = paths[0].read_bytes()
    for change in (lambda: paths[0].write_bytes(encode(noise(40, 48, seed=7))), paths[0].unlink):
        change()
        with pytest.raises(UserError, match=f"{paths[0]}: changed or vanished"):
            open_store(paths, digests, 32, "squash", Cache(own_cache))
        assert not list(own_cache.glob("store/*/*"))
    paths[0].write_bytes(original)
    assert_right(open_store(paths, digests, 32, "squash", Cache(own_cache)), paths)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap_rows(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta["digests"].reverse()
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "images.u8", 100),
    "images cut short": lambda folder: os.truncate(folder / "images.u8", 1500),
    "images gone": lambda folder: (folder / "images.u8").unlink(),
    "meta cut short": lambda folder: os.truncate(folder / "meta.json", 40),
    "meta empty": lambda folder: os.truncate(folder / "meta.json", 0),
    "meta gone": lambda folder: (folder / "meta.json").unlink(),
    "meta is something else": lambda folder: (folder / "meta.json").write_text("[1]"),
    "meta lacks a field": lambda folder: (folder / "meta.json").write_text("{}"),
    "meta tells wrong rows": swap_rows,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_detected_and_rebuilt(tmp_path: Path, own_cache: Path, damage: str) -> None:
    paths = make_files(tmp_path / "data", 2)
    build(paths, own_cache)
    folder = folder_of(own_cache)
    DAMAGE[damage](folder)
    with pytest.warns(UserWarning, match=f"{folder}: the decoded images were damaged"):
        store = build(paths, own_cache)
    assert_right(store, paths)
    assert_right(build(paths, own_cache), paths)
    assert list(folder.parent.iterdir()) == [folder]


def test_rows_of_a_damaged_store_are_not_reused(tmp_path: Path, own_cache: Path) -> None:
    paths = make_files(tmp_path / "data", 3)
    build(paths[:2], own_cache)
    flip(folder_of(own_cache) / "images.u8", 5)
    with pytest.warns(UserWarning, match="damaged"):
        store = build(paths, own_cache)
    assert_right(store, paths)


def test_a_store_removed_by_another_run_is_rebuilt(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(tmp_path / "data", 2)
    original, drops = module._build, [1]

    def build_and_lose(folder: Path, *args: Any) -> None:
        original(folder, *args)
        if drops:
            drops.pop()
            remove_folder(folder)

    monkeypatch.setattr(module, "_build", build_and_lose)
    assert_right(build(paths, own_cache), paths)
    assert not drops


def test_removing_an_already_removed_store_is_no_error(tmp_path: Path) -> None:
    remove_folder(tmp_path / "gone")
    assert not list(tmp_path.iterdir())


def test_a_run_that_lost_the_race_uses_the_winners_store(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(tmp_path / "data", 2)
    original = module._write_rows

    def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(module, "_write_rows", original)
        build(paths, own_cache)
        return original(*args)

    monkeypatch.setattr(module, "_write_rows", overtaken)
    assert_right(build(paths, own_cache), paths)
    folder = folder_of(own_cache)
    assert list(folder.parent.iterdir()) == [folder]


def build_on_signal(folder: str, cache: str, ready: Any, go: Any, results: Any) -> None:
    """Build the store in a separate process."""
    paths = sorted(Path(folder).iterdir())
    ready.release()
    go.wait()
    store = build(paths, Path(cache))
    assert_right(store, paths)
    results.put(len(store.images))


@pytest.mark.slow
def test_two_processes_can_build_the_same_store(tmp_path: Path, own_cache: Path) -> None:
    make_files(tmp_path / "data", 20)
    context = multiprocessing.get_context("spawn")
    ready, go, results = context.Semaphore(0), context.Event(), context.Queue()
    arguments = (str(tmp_path / "data"), str(own_cache), ready, go, results)
    processes = [context.Process(target=build_on_signal, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert all(ready.acquire(timeout=60) for _ in processes)
    go.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [results.get(timeout=5) for _ in processes] == [20, 20]
    folder = folder_of(own_cache)
    assert list(folder.parent.iterdir()) == [folder]


def test_half_built_folders_of_dead_processes_are_removed_and_others_are_not(tmp_path: Path, own_cache: Path) -> None:
    paths = make_files(tmp_path / "data", 2)
    build(paths[:1], own_cache)
    parent, host = folder_of(own_cache).parent, socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    names = {
        "dead": f".building-{host}-{dead.pid}-abc",
        "alive": f".building-{host}-{os.getppid()}-abc",
        "elsewhere": f".building-{host}-2-{dead.pid}-abc",
    }
    for name in names.values():
        (parent / name).mkdir()
    build(paths, own_cache)
    assert {key for key, name in names.items() if (parent / name).exists()} == {"alive", "elsewhere"}


@pytest.mark.parametrize("step", ["write", "fsync", "meta"])
def test_a_full_disk_is_reported_and_no_files_remain(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*args: object, **kwargs: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullFile(io.BytesIO):
        write = full

    paths = make_files(tmp_path / "data", 2)
    digests = digest_files(paths)
    if step == "write":
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda self, mode: FullFile() if mode == "wb" else opened(self, mode))
    else:
        monkeypatch.setattr(*((os, "fsync", full) if step == "fsync" else (Path, "write_text", full)))
    with pytest.raises(UserError, match=rf"{own_cache}.*No space left on device.*--cache-dir"):
        open_store(paths, digests, 32, "squash", Cache(own_cache))
    monkeypatch.undo()
    assert not list(own_cache.glob("store/*/*"))
    assert_right(build(paths, own_cache), paths)


def test_a_full_disk_stops_the_decoding_of_the_rest(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(tmp_path / "data", 60)
    done: list[int] = []

    def slowly(*args: object) -> tuple[UInt8, tuple[int, int, str]]:
        time.sleep(0.02)
        done.append(1)
        return noise(32, 32), (48, 40, "L")

    def full(path: Path, size: int, rows: Any) -> Any:
        next(rows)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "decode_gray", slowly)
    monkeypatch.setattr(module, "_write_rows", full)
    with pytest.raises(UserError, match="No space"):
        build(paths, own_cache)
    time.sleep(0.4)
    assert len(done) < 60


def test_an_interrupted_build_leaves_no_files(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(make_files(tmp_path / "data", 2), own_cache)
    assert not list(own_cache.glob("store/*/*"))


def test_a_cache_path_that_is_a_file_is_rejected_by_name(tmp_path: Path) -> None:
    paths = make_files(tmp_path / "data", 1)
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=rf"{tmp_path}/taken.*Not a directory"):
        build(paths, tmp_path / "taken")


def test_decoding_in_threads_does_not_change_the_warning_filters(tmp_path: Path, own_cache: Path) -> None:
    before = list(warnings.filters)
    build(make_files(tmp_path / "data", 60), own_cache)
    assert list(warnings.filters) == before
