"""Grad-CAM overlays of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from torchvision.models import ResNet

from cxr.errors import UserError
from cxr.serving import explain
from cxr.serving.predictor import ModelCard, Predictor
from cxr.task import KAGGLE


def test_an_overlay_shows_the_image_where_the_heat_map_is_zero() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    plain = explain.overlay(image, np.zeros((16, 16)))
    assert plain.dtype == np.uint8
    np.testing.assert_array_equal(plain, np.repeat(image[:, :, None], 3, 2))


def test_an_overlay_gets_warmer_with_the_heat_map() -> None:
    red, _, blue = explain.overlay(np.full((1, 5), 128, np.uint8), np.linspace(0, 1, 5)[None])[0].astype(int).T
    assert (np.diff(red - blue)[1:] > 20).all()
    assert red[-1] - blue[-1] > 100


@pytest.fixture
def predictor(tiny: ResNet) -> Predictor:
    card = ModelCard("resnet18", 64, "pad", 0.5, "full", "0123456789ab", "random", KAGGLE.class_to_index)
    return Predictor(tiny, card)


@pytest.fixture
def files(phantoms: Path) -> list[Path]:
    return sorted(phantoms.glob("test/*/*.jpeg"))[:2]


def test_every_file_gets_a_picture(predictor: Predictor, files: list[Path], tmp_path: Path) -> None:
    written = explain.explain_files(predictor, files, tmp_path / "made" / "here")
    assert written == [tmp_path / "made" / "here" / f"{file.stem}_gradcam.png" for file in files]
    assert set(written) == set((tmp_path / "made" / "here").iterdir())
    for file in written:
        with Image.open(file) as picture:
            assert picture.width > 2 * 64


def test_a_picture_names_file_decision_and_probability(
    predictor: Predictor, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: titles.append(figure.get_suptitle()))
    explain.explain_files(predictor, files, tmp_path)
    table = predictor.predict_files(files)
    for title, file, (_, row) in zip(titles, files, table.iterrows(), strict=True):
        words = " ".join(title.split())
        assert words.startswith(f"{file.name}: decision {row['label']}, ")
        assert f"{row['probability']:.3f}" in words


@pytest.mark.parametrize("name", ["a$x_{$.png", "\u80ba.png", "two\nlines.png", "a" * 200 + ".png"])
def test_unusual_file_names_are_rendered(predictor: Predictor, files: list[Path], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(files[0].read_bytes())
    (written,) = explain.explain_files(predictor, [tmp_path / name], tmp_path / "out")
    assert written.stat().st_size > 0


def test_images_of_one_stem_do_not_overwrite_each_other(
    predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    names = ["a/x.jpeg", "b/x.jpeg", "b/X.jpeg", "b/x_gradcam.jpeg", "b/x_gradcam_2.jpeg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(files[0].read_bytes())
    paths = [tmp_path / name for name in [*names, "a/x.jpeg"]]
    written = explain.explain_files(predictor, paths, tmp_path / "out")
    assert [file.name for file in written[:3]] == ["x_gradcam.png", "x_gradcam_2.png", "X_gradcam_3.png"]
    assert len({str(file).casefold() for file in written}) == len(paths)


def test_all_bad_files_are_named_before_anything_is_written(
    predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no image")
    paths = [files[0], tmp_path / "text.png", tmp_path / "absent.png"]
    with pytest.raises(UserError, match=r"2 of 3 .*text\.png.*absent\.png"):
        explain.explain_files(predictor, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_to_explain_is_not_overwritten(predictor: Predictor, files: list[Path], tmp_path: Path) -> None:
    paths = [tmp_path / "x.png", tmp_path / "x_gradcam.png"]
    for path in paths:
        path.write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match=r"would overwrite .*x_gradcam\.png"):
        explain.explain_files(predictor, paths, tmp_path / "absent" / "..")
    assert paths[1].read_bytes() == files[0].read_bytes()


def test_a_folder_that_cannot_be_written_is_a_user_error(
    predictor: Predictor, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="name another folder"):
            explain.explain_files(predictor, files, folder)
