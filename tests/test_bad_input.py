"""Invalid input end to end: one line with problem, place and remedy; exit code 2; no partial files."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import mlflow
import numpy as np
import pytest
import torch
from command import run_main
from dicoms import dicomdir, encoded, radiograph
from mlflow.entities import Run
from narrow import ARCH
from payload import Payload
from PIL import Image
from torchvision.models import resnet34

from cxr.storage import write_atomically
from cxr.training import checkpoint

TINY = (
    *("--arch", ARCH, "--weights", "random", "--image-size", "64"),
    *("--epochs", "1", "--bootstrap", "0", "--views", "1"),
)


@pytest.fixture
def folder(phantoms: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may damage."""
    return Path(shutil.copytree(phantoms, tmp_path / "data"))


class Refused:
    """Runs a command that must fail, and checks its message and the files that it leaves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path):
        self.monkeypatch, self.capsys, self.cache = monkeypatch, capsys, cache

    def __call__(self, *arguments: str, says: tuple[str, ...]) -> str:
        code = run_main(self.monkeypatch, *arguments)
        errors = self.capsys.readouterr().err.strip().splitlines()
        assert code == 2, errors
        line = errors[-1]
        assert [other for other in errors if other.startswith("error: ")] == [line]
        assert "Traceback" not in "".join(errors)
        assert [part for part in says if part not in line] == []
        half_written = [".building-*", ".*.tmp", "runs/*/*"]
        assert [found for pattern in half_written for found in self.cache.rglob(pattern)] == []
        return line

    def train(self, *options: str, says: tuple[str, ...]) -> str:
        """`cxr train`; if it opened a run before it failed, that one ended FAILED with the reason."""
        before = {run.info.run_id for run in all_runs()}
        line = self("train", *options, says=says)
        for run in all_runs():
            if run.info.run_id not in before:
                assert run.info.status == "FAILED"
                assert line.removeprefix("error: ")[:200] in run.data.tags["cxr.error"]
        return line


def all_runs() -> list[Run]:
    found: list[Run] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return found


@pytest.fixture
def refused(
    in_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> Refused:
    return Refused(monkeypatch, capsys, own_cache)


def empty(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return f"{folder}: contains no train/ folder"


def without_class_folders(folder: Path) -> str:
    for file in list(folder.glob("train/*/*")):
        file.rename(folder / "train" / file.name)
    for name in ("NORMAL", "PNEUMONIA"):
        (folder / "train" / name).rmdir()
    return f"{folder}/train/NORMAL: contains no .jpeg"


def one_class(folder: Path) -> str:
    for path in list(folder.glob("*/PNEUMONIA")):
        shutil.rmtree(path)
    return f"{folder}/train/PNEUMONIA: contains no .jpeg"


def a_class_missing_from_test(folder: Path) -> str:
    shutil.rmtree(folder / "test" / "NORMAL")
    return f"{folder}/test/NORMAL: contains no .jpeg"


def missing(folder: Path) -> str:
    shutil.rmtree(folder)
    return f"{folder}: no such folder"


@pytest.mark.parametrize("spoil", [missing, empty, without_class_folders, one_class, a_class_missing_from_test])
def test_an_unusable_data_folder(refused: Refused, folder: Path, spoil: Callable[[Path], str]) -> None:
    says = spoil(folder)
    refused.train(*TINY, "--data-dir", str(folder), says=(says,))


def test_an_official_split_without_a_class_in_validation(refused: Refused, folder: Path) -> None:
    shutil.rmtree(folder / "val")
    says = ("--val-split official", "no NORMAL image in val", "--val-fraction")
    refused.train(*TINY, "--data-dir", str(folder), "--val-split", "official", says=says)


def test_a_folder_without_read_permission(refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.listdir

    def guarded(path: str) -> list[str]:  # chmod has no effect for root
        if Path(path) == folder / "train" / "NORMAL":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", guarded)
    says = (f"{folder}/train/NORMAL: cannot be read (Permission denied)", "check its permissions")
    refused.train(*TINY, "--data-dir", str(folder), says=says)


def picture(mode: str, format: str, size: tuple[int, int] = (80, 64)) -> bytes:
    buffer = io.BytesIO()
    if mode == "I;16":
        ramp = np.linspace(0, 65535, size[0] * size[1]).astype(np.uint16).reshape(size[::-1])
        Image.fromarray(ramp).save(buffer, format)
    else:
        Image.new("RGB", size, (90, 90, 90)).convert(mode).save(buffer, format)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header declares 20,000 x 20,000 pixels."""
    data = bytearray(picture("L", "PNG"))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    return bytes(data)


BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "truncated.jpeg": (picture("L", "JPEG")[:-60], "truncated"),
    "zero.jpeg": (b"", "zero bytes"),
    "text.jpeg": (b"this is no image", "not a JPEG, PNG or DICOM file"),
    "dot.png": (picture("L", "PNG", (1, 1)), "1x1: smaller than 32 pixels"),
    "bomb.png": (bomb(), ""),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_bad_images_are_named_at_once(refused: Refused, folder: Path) -> None:
    for name, (data, _) in BAD_IMAGES.items():
        (folder / "train" / "NORMAL" / name).write_bytes(data)
    says = [f"train/NORMAL/{name} (" for name in BAD_IMAGES]
    says += [f"{len(BAD_IMAGES)} unreadable", "--on-bad-image skip"]
    refused.train(*TINY, "--data-dir", str(folder), says=tuple(says))


@pytest.mark.parametrize("name", list(BAD_IMAGES))
def test_one_bad_image_stops_the_run(refused: Refused, folder: Path, name: str) -> None:
    data, reason = BAD_IMAGES[name]
    (folder / "test" / "PNEUMONIA" / name).write_bytes(data)
    says = ("1 unreadable image", f"test/PNEUMONIA/{name}", reason)
    refused.train(*TINY, "--data-dir", str(folder), says=says)


def test_skipped_images_are_in_the_audit_and_counted(
    in_store: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (data, _) in BAD_IMAGES.items():
        (folder / "train" / "NORMAL" / name).write_bytes(data)
    options = [*TINY, "--data-dir", str(folder), "--on-bad-image", "skip", "--register", "none"]
    assert run_main(monkeypatch, "train", *options, "--strategy", "frozen") == 0
    assert f"{len(BAD_IMAGES)} unreadable images SKIPPED" in capsys.readouterr().out
    newest = mlflow.search_runs(experiment_names=["cxr"], order_by=["start_time DESC"], output_format="list")[0]
    audit = mlflow.artifacts.load_text(f"{newest.info.artifact_uri}/data/audit.txt")
    assert [name for name in BAD_IMAGES if name not in audit] == []
    assert newest.data.tags["images_skipped"] == str(len(BAD_IMAGES))


def oversized() -> bytes:
    """A DICOM file whose header declares 60,000 x 60,000 pixels."""
    return encoded(radiograph(np.zeros((64, 80), np.uint8), Rows=60_000, Columns=60_000))


BAD_DICOM: dict[str, tuple[bytes, str]] = {
    "DICOMDIR": (dicomdir(), "a DICOMDIR"),
    "text.dcm": (b"this is no image", "not a DICOM file"),
    "truncated.dcm": (encoded(radiograph(np.zeros((64, 80), np.uint8)))[:-60], "truncated"),
    "oversized.dcm": (oversized(), "60000x60000: more than 60,000,000 pixels"),
}


@pytest.mark.parametrize("name", list(BAD_DICOM))
def test_a_bad_dicom_file_is_named_by_its_digest(refused: Refused, folder: Path, name: str) -> None:
    data, reason = BAD_DICOM[name]
    (folder / "test" / "PNEUMONIA" / name).write_bytes(data)
    line = refused.train(*TINY, "--data-dir", str(folder), says=("1 unreadable image", reason, "--paths plain"))
    assert hashlib.sha256(data).hexdigest()[:16] in line
    assert name not in line.replace("a DICOMDIR", "")
    says = (f"test/PNEUMONIA/{name}", reason)
    refused.train(*TINY, "--data-dir", str(folder), "--paths", "plain", says=says)


def test_bad_dicom_files_to_predict(
    refused: Refused, finished: tuple[Any, Any, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (data, _) in BAD_DICOM.items():
        (tmp_path / name).write_bytes(data)
    model = f"models:/{finished[2].outputs.model_outputs[0].model_id}"
    files = [str(tmp_path / name) for name in BAD_DICOM]
    reasons = tuple(reason for _, reason in BAD_DICOM.values())
    refused("predict", *files, "--model", model, says=("4 of 4 images cannot be read", *reasons))
    refused("explain", *files, "--model", model, "--out", str(tmp_path / "out"), says=reasons)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mode", "format"), [("I;16", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG")]
)
def test_other_modes_are_converted(
    folder: Path, mode: str, format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train" / "NORMAL" / f"odd.{format.lower()}").write_bytes(picture(mode, format))
    assert run_main(monkeypatch, "data", "audit", str(folder)) == 0
    assert "corrupt files: none" in capsys.readouterr().out


def test_cuda_where_it_is_unavailable(refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says = ("--device cuda", "not available on this machine", "--device auto or cpu")
    refused.train(*TINY, "--data-dir", str(folder), "--device", "cuda", says=says)


def absent(path: Path) -> str:
    return "no such file"


def truncated(path: Path) -> str:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    return "cannot be read"


def of_another_arch(path: Path) -> str:
    torch.save(resnet34(weights=None).state_dict(), path)
    return "does not fit --arch: unknown: layer1.2.conv1.weight"


def malicious(path: Path) -> str:
    path.write_bytes(pickle.dumps({"conv1.weight": Payload(path.with_name("mark"))}, protocol=2))
    return "refused, it holds more than tensors"


@pytest.mark.parametrize("make", [absent, truncated, of_another_arch, malicious])
def test_weights_that_cannot_be_used(
    refused: Refused, phantoms: Path, tmp_path: Path, make: Callable[[Path], str]
) -> None:
    path = tmp_path / "weights.pth"
    says = make(path)
    options = ("--arch", "resnet18", "--data-dir", str(phantoms), "--weights", str(path))
    refused.train(*TINY, *options, says=(f"--weights {path}", says))
    assert not (tmp_path / "mark").exists()


def test_an_unreachable_tracking_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], phantoms: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    started = time.monotonic()
    assert run_main(monkeypatch, "train", *TINY, "--data-dir", str(phantoms)) == 2
    assert time.monotonic() - started < 30
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: MLflow at http://127.0.0.1:9")
    assert line.endswith("check MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(None)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("train", "--register", "a/b"), ("--register a/b", "letters, digits")),
        (("predict", "x.png", "--model", "models:/nothing@champion"), ("models:/nothing@champion", "models list")),
        (("predict", "x.png", "--model", "runs:/0123/model"), ("runs:/0123/model",)),
        (("predict", "x.png", "--model", "/no/such/folder"), ("/no/such/folder",)),
        (("evaluate", "--data-dir", "/no/such/folder", "--model", "models:/nothing/1"), ("models:/nothing/1",)),
        (("models", "export", "out", "--model", "models:/nothing/1"), ("models:/nothing/1",)),
        (("models", "list", "--name", "nothing"), ("nothing",)),
        (("models", "promote", "99"), ("version 99",)),
        (("train", "--resume", "0" * 32), ("0" * 32,)),
        (("train", "--val-fraction", "1.5"), ("--val-fraction 1.5", "at most 0.5")),
        (("train", "--lr-all", "0"), ("--lr-all 0.0", "above 0")),
        (("train", "--lr-all", "nan"), ("--lr-all nan", "not a finite number")),
        (("train", "--batch-size", "many"), ("--batch-size", "not a valid integer")),
    ],
)
def test_unknown_names_and_invalid_numbers(
    refused: Refused, command: tuple[str, ...], says: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*command, says=says)
    assert [path for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_a_disk_that_is_full_while_checkpointing(
    refused: Refused, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(checkpoints: checkpoint.Checkpoints, file: str, data: bytes) -> None:
        write_atomically(checkpoints.folder / file, lambda stream: fail())

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.Checkpoints, "_write_tensors", full)
    says = ("base-0.safetensors: cannot be written (No space left on device)", "--cache-dir")
    refused.train(*TINY, "--data-dir", str(phantoms), says=says)


def test_a_disk_that_fills_after_an_epoch(refused: Refused, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checkpoint.write_atomically

    def fills(path: Path, write: Callable[[BinaryIO], object]) -> None:
        def fail(file: BinaryIO) -> object:
            write(file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        kept(path, fail if path.name == "last.pt" else write)

    monkeypatch.setattr(checkpoint, "write_atomically", fills)
    with pytest.raises(AssertionError, match="best-0"):  # complete files are kept, partial ones are removed
        refused.train(*TINY, "--data-dir", str(phantoms), says=("last.pt: cannot be written (No space left",))
    assert sorted(path.name for path in refused.cache.glob("runs/*/*")) == ["base-0.safetensors", "best-0.safetensors"]


@pytest.mark.filterwarnings("always:.*decoding them again")
def test_a_corrupted_store_is_rebuilt(
    phantoms: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "data", "audit", str(phantoms)) == 0
    (file,) = own_cache.glob("store/*/*/images.u8")
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 255]) + whole[101:])
    assert run_main(monkeypatch, "data", "audit", str(phantoms)) == 0
    assert "the decoded images were damaged; decoding them again" in capsys.readouterr().err
    assert file.read_bytes() == whole


def test_a_tracking_server_lost_during_a_run(refused: Refused, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    from cxr.tracking.tracker import MlflowTracker

    def lost(*arguments: object, **options: object) -> None:
        raise MlflowException("API request failed\nwith a long story")

    monkeypatch.setattr(MlflowTracker, "metrics", lost)
    code = run_main(monkeypatch, "train", *TINY, "--data-dir", str(phantoms))
    error = refused.capsys.readouterr().err
    newest = mlflow.search_runs(experiment_names=["cxr"], order_by=["start_time DESC"], output_format="list")[0]
    assert (code, newest.info.status) == (2, "FAILED")
    assert (
        error.strip()
        .splitlines()[-1]
        .endswith(f"API request failed; when it answers again, continue with: cxr train --resume {newest.info.run_id}")
    )
    assert "Traceback" not in error
