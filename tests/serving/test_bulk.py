"""Predictions for many images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from narrow import narrow_resnet
from PIL import Image

from cxr.errors import UserError
from cxr.serving.bulk import _AHEAD, _BATCH, image_files, predicted, write_predictions
from cxr.serving.predictor import ModelCard, Predictor
from cxr.task import KAGGLE

COUNT = _BATCH * (_AHEAD + 2) + 5


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    card = ModelCard("resnet18", 32, "squash", 0.5, "frozen", "0" * 12, "random", KAGGLE.class_to_index)
    return Predictor(narrow_resnet().eval(), card)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than are read ahead, in two folders; three of them cannot be read."""
    root, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    for number in range(COUNT):
        file = root / ("a" if number % 2 else "b/c") / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)).save(file)
    (root / "a/001.png").write_bytes(b"")
    (root / "a/003.png").write_bytes(b"text")
    (root / "b/c/100.png").write_bytes((root / "b/c/100.png").read_bytes()[:200])
    (root / "notes.txt").write_text("no image")
    return root


def test_every_image_is_predicted_as_alone_and_bad_ones_are_named(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    files = image_files([folder])
    assert len(files) == COUNT
    count, bad = write_predictions(predictor, files, tmp_path / "new" / "out.csv")
    assert count == COUNT - 3
    assert {Path(path).name: reason for path, reason in bad}.items() >= {
        "001.png": "zero bytes",
        "003.png": "not a JPEG, PNG or DICOM file",
    }.items()
    table = pd.read_csv(tmp_path / "new" / "out.csv")
    assert list(table["image"]) == [str(file) for file in files]
    assert list(table.columns) == ["image", "label", "probability", "decision", "error"]
    for row in (4, 60, COUNT - 1):
        alone = predictor.predict_files([files[row]])
        assert table["probability"][row] == pytest.approx(alone["probability"][0], abs=1e-5)
    assert table["error"].notna().sum() == table["probability"].isna().sum() == 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.csv"]


def test_no_more_than_a_few_batches_are_held(
    predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), read_bytes(path))[1])
    next(predicted(predictor, image_files([folder])))
    assert len(read) <= _BATCH * (_AHEAD + 1)


def test_lists_and_files_name_images_and_what_names_none_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").write_text("file_name\na/005.png\nb/c/000.png\n")
    listed = image_files([folder / "list.csv", folder / "a/007.png"])
    assert [path.name for path in listed] == ["005.png", "000.png", "007.png"]
    (folder / "list.csv").write_text("name\na/005.png\n")
    with pytest.raises(UserError, match="no column for the path"):
        image_files([folder / "list.csv"])
    with pytest.raises(UserError, match="contains no image"):
        image_files([tmp_path])


def test_a_file_that_cannot_be_written_leaves_nothing(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_predictions(predictor, image_files([folder])[:2], tmp_path / "file" / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
