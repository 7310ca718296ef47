"""Acquisition cues, how well each separates the classes, and the shift between splits."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dicoms import encoded, radiograph
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from cxr.audit.shortcuts import Floats, Ints, cue_table, separabilities, separability, shift
from cxr.data.phantoms import phantom

LABELS = np.tile(np.array([0, 1]), 80)
GROUPS = np.arange(160) // 2


def noise(seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=len(LABELS))


def test_a_cue_that_separates_the_classes_is_near_one() -> None:
    assert separability(noise(0) + 6 * LABELS, LABELS, GROUPS) > 0.97
    assert separability(noise(0) - 6 * LABELS, LABELS, GROUPS) > 0.97


def test_a_cue_that_is_extreme_in_one_class_counts_though_it_is_not_monotone() -> None:
    assert separability(noise(0) * np.where(LABELS, 20, 0.5), LABELS, GROUPS) > 0.85


@pytest.mark.parametrize("seed", range(5))
def test_an_unrelated_cue_is_far_from_a_shortcut(seed: int) -> None:
    assert 0.5 <= separability(noise(seed), LABELS, GROUPS) < 0.65


def test_a_constant_or_missing_cue_is_uninformative() -> None:
    assert separability(np.full(len(LABELS), 3.0), LABELS, GROUPS) == 0.5
    assert separability(np.full(len(LABELS), np.nan), LABELS, GROUPS) == 0.5


def test_that_a_value_is_missing_is_a_cue() -> None:
    assert separability(np.where(LABELS, np.nan, noise(0)), LABELS, GROUPS) == 1


@given(st.integers(0, 5), st.sampled_from([1e-9, 0.3, 1.0, 7.0, 1e9]))
def test_the_scale_of_a_cue_does_not_matter(seed: int, scale: float) -> None:
    values = noise(seed) + LABELS
    expected = separability(values, LABELS, GROUPS)
    assert separability(values * scale, LABELS, GROUPS) == expected
    assert separability(np.exp(values), LABELS, GROUPS) == expected


def test_a_cue_of_the_patient_is_not_mistaken_for_one_of_the_class() -> None:
    groups = np.repeat(np.arange(8), 20)
    labels = np.repeat(np.array([0, 1, 0, 1, 1, 0, 1, 0]), 20)
    assert separability(groups.astype(float), labels, groups) < 0.8


def test_one_group_in_a_class_is_too_few() -> None:
    assert np.isnan(separability(noise(0), LABELS, LABELS))


def test_cues_are_listed_strongest_first() -> None:
    cues = pd.DataFrame({"weak": noise(0), "strong": noise(1) + 5 * LABELS})
    assert list(separabilities(cues, LABELS, GROUPS)) == ["strong", "weak"]


def test_cues_are_read_from_the_headers(tmp_path: Path) -> None:
    film = Image.fromarray(phantom(np.random.default_rng(0), "normal", 64))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    film.save(tmp_path / "fine.jpeg", quality=95)
    film.save(tmp_path / "coarse.jpeg", quality=20)
    film.resize((128, 64)).convert("RGB").save(tmp_path / "wide.png", icc_profile=profile)
    (tmp_path / "broken.png").write_bytes(b"no image")
    manifest = pd.DataFrame({"path": ["fine.jpeg", "coarse.jpeg", "wide.png", "broken.png", "missing.png"]})
    cues = cue_table(tmp_path, manifest)
    assert cues["width"].tolist()[:3] == [64, 64, 128]
    assert cues["aspect ratio"].tolist()[:3] == [1, 1, 2]
    assert cues["ICC profile"].tolist()[:3] == [0, 0, 1]
    assert cues["bytes per pixel"][0] == (tmp_path / "fine.jpeg").stat().st_size / 64**2
    assert cues["JPEG quantisation"][1] > 5 * cues["JPEG quantisation"][0]
    assert np.isnan(cues["JPEG quantisation"][2])
    assert cues["colour mode"][0] == cues["colour mode"][1] != cues["colour mode"][2]
    assert cues.loc[3:, "width"].isna().all()


def test_brightness_comes_from_the_decoded_images(phantoms: Path) -> None:
    path = "train/NORMAL/" + next((phantoms / "train" / "NORMAL").iterdir()).name
    images = np.full((1, 8, 8), 200, np.uint8)
    assert cue_table(phantoms, pd.DataFrame({"path": [path]}), images)["brightness"].tolist() == [200]


@pytest.fixture(scope="module")
def pooled() -> Floats:
    """Healthy films as 36 mean grey levels each, [160, 36]."""
    rng = np.random.default_rng(0)
    films = np.stack([phantom(rng, "normal", 36) for _ in range(160)])
    return films.reshape(-1, 6, 6, 6, 6).mean(axis=(2, 4)).reshape(-1, 36).astype(np.float32)


def halves(other: str) -> tuple[np.ndarray, Ints, Ints]:
    """(splits, labels, groups) of 160 healthy films, every other one in `other`."""
    return np.tile(np.array(["train", other, "train", other]), 40), np.zeros(160, np.int64), np.arange(160)


def test_a_brightened_split_is_distinguished_from_train(pooled: Floats) -> None:
    splits, labels, groups = halves("test")
    features = (pooled + 40 * (splits == "test")[:, None]).astype(np.float32)
    assert shift(features, splits, labels, groups)["test", "NORMAL"] > 0.9


@pytest.mark.parametrize("other", ["val", "test"])
def test_random_halves_are_alike(pooled: Floats, other: str) -> None:
    found = shift(pooled.astype(np.float32), *halves(other))
    assert list(found) == [(other, "NORMAL")]
    assert 0.3 < found[other, "NORMAL"] < 0.65


def test_splits_with_few_images_are_left_out(pooled: Floats) -> None:
    splits, labels, groups = halves("test")
    assert shift(pooled[:38].astype(np.float32), splits[:38], labels[:38], groups[:38]) == {}


def test_features_of_other_images_are_refused(pooled: Floats) -> None:
    with pytest.raises(ValueError, match="159 rows of features for 160 images"):
        shift(pooled[1:].astype(np.float32), *halves("test"))


def test_cues_of_dicom_files_and_of_files_named_elsewhere(tmp_path: Path) -> None:
    data = encoded(radiograph(np.zeros((40, 50)), 12))
    for name in ("a.dcm", "b"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "c.dcm").write_bytes(data[:-3000])
    (tmp_path / "d.dcm").write_bytes(b"text")
    table = pd.DataFrame({"path": ["digest"] * 4, "file": sorted(tmp_path.iterdir())})
    cues = cue_table(tmp_path, table)
    assert cues.iloc[0].equals(cues.iloc[1])
    assert cues.loc[0, ["width", "height", "aspect ratio", "ICC profile"]].tolist() == [50, 40, 1.25, 0]
    assert cues.loc[0, "bytes per pixel"] == len(data) / 2000
    assert cues.loc[3].drop("colour mode").isna().all()
