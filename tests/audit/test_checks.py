"""The findings of the audit for a manifest, and the handling of unreadable images."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr.audit.checks import Finding, audit, leaks
from cxr.data.kaggle import index_folder
from cxr.data.load import reject_bad
from cxr.data.phantoms import phantom
from cxr.data.splits import assign_splits
from cxr.errors import UserError

BAD = {"train/NORMAL/b.png": "zero bytes", "test/PNEUMONIA/a.png": "not a JPEG or PNG"}


def manifest(rows: list[tuple[str, int, str]]) -> pd.DataFrame:
    """Rows of (split, label, group); a path is made up for each."""
    table = pd.DataFrame(rows, columns=["split", "label", "group"])
    table["path"] = [f"{split}/{n}.png" for n, split in enumerate(table["split"])]
    return table


def sound() -> pd.DataFrame:
    return manifest([(split, y, f"{split}{y}") for split in ("train", "val", "test") for y in (0, 1)])


def find(findings: list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def test_a_sound_folder_passes_every_check() -> None:
    findings = audit(sound(), {})
    assert len(findings) == 5
    assert [finding.line()[:5] for finding in findings] == ["ok   "] * 5


def test_images_are_counted_by_split_and_class() -> None:
    rows = [("train", 1, "a"), ("train", 1, "b"), ("train", 0, "c"), ("test", 1, "d")]
    assert (
        find(audit(manifest(rows), {}), "images (NORMAL/PNEUMONIA)").line()
        == "ok   images (NORMAL/PNEUMONIA): test 0/1, train 1/2"
    )


def test_a_class_balance_that_differs_between_splits_is_a_warning() -> None:
    rows = [("train", 1, "a"), ("train", 1, "b"), ("train", 0, "c"), ("test", 1, "d"), ("test", 0, "e")]
    finding = find(audit(manifest(rows), {}), "class balance")
    assert finding.line() == "WARN class balance: test 50.0%, train 66.7% (differs between splits)"


def test_corrupt_files_are_named_with_their_reasons() -> None:
    finding = find(audit(sound(), BAD), "corrupt files")
    assert finding.line() == (
        "WARN corrupt files: test/PNEUMONIA/a.png (not a JPEG or PNG); train/NORMAL/b.png (zero bytes)"
    )


def test_file_names_that_do_not_identify_patients_are_counted() -> None:
    table = sound()
    table.loc[:1, "group"] = table.loc[:1, "path"]
    finding = find(audit(table, {}), "patients")
    assert not finding.ok
    assert "6 groups; 2 file names do not identify patients" in finding.detail


@pytest.mark.parametrize(("crossing", "said"), [(1, "1 (p0)"), (5, "5 (p0, p1, p2, p3, p4)"), (6, "p4, …)")])
def test_patients_in_more_than_one_split_are_named(crossing: int, said: str) -> None:
    rows = [(split, 0, f"p{n}") for n in range(crossing) for split in ("train", "test")]
    finding = find(audit(manifest(rows), {}), "patients in more than one split")
    assert not finding.ok
    assert finding.detail.endswith(said)


def test_stop_names_all_bad_images_at_once_in_order() -> None:
    with pytest.raises(UserError, match=r"^2 unreadable image\(s\): ") as caught:
        reject_bad(sound(), BAD, "stop")
    said = str(caught.value)
    assert "test/PNEUMONIA/a.png (not a JPEG or PNG); train/NORMAL/b.png (zero bytes)" in said
    assert "--on-bad-image skip" in said
    assert "\n" not in said


def test_skip_drops_the_bad_images_and_no_others() -> None:
    table = sound()
    kept = reject_bad(table, {"train/1.png": "x", "test/5.png": "y"}, "skip")
    assert list(kept["path"]) == ["train/0.png", "val/2.png", "val/3.png", "test/4.png"]
    assert list(kept.index) == [0, 1, 2, 3]
    assert len(table) == 6


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_nothing_is_dropped_where_nothing_is_bad(on_bad_image: str) -> None:
    pd.testing.assert_frame_equal(reject_bad(sound(), {}, on_bad_image), sound())


Images = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def films() -> Images:
    """Films of twelve patients, [12, 64, 64]."""
    rng = np.random.default_rng(11)
    return np.stack([phantom(rng, "virus" if n % 2 else "normal", 64) for n in range(12)])


def digested(images: Images) -> pd.DataFrame:
    """A sound manifest of 12 and more images; those after the twelfth are in test, in the class of the first."""
    spare = len(images) - 12
    table = manifest([(split, n % 2, f"{split}{n}") for split in ("train", "val", "test") for n in range(4)])
    extra = manifest([("test", 0, f"extra{n}") for n in range(spare)]) if spare else table[:0]
    table = pd.concat([table, extra.assign(path=[f"copy{n}.png" for n in range(spare)])], ignore_index=True)
    return table.assign(digest=[f"d{n}" for n in range(len(table))])


def saved_again(film: Images) -> Images:
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, "JPEG", quality=40)
    return np.asarray(Image.open(buffer))


def cropped(film: Images) -> Images:
    return np.asarray(Image.fromarray(film).resize((64, 64), Image.Resampling.BILINEAR, box=(2, 2.5, 61, 61.5)))


def test_clean_phantoms_have_no_leak_and_no_duplicate(films: Images) -> None:
    findings = audit(digested(films), {}, images=films)
    assert [finding.line() for finding in findings if not finding.ok] == []
    assert leaks(findings) == []


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (saved_again, "copy"),
        (lambda film: film[:, ::-1], "mirrored"),
        (cropped, "cropped"),
        (lambda film: film, "same pixels"),
    ],
)
def test_changed_copies_of_training_images_in_test_are_a_leak(
    films: Images, change: Callable[[Images], Images], how: str
) -> None:
    images = np.concatenate([films, change(films[0])[None]])
    findings = audit(digested(images), {}, images=images)
    (leak,) = leaks(findings)
    assert leak.line() == "WARN near duplicates in more than one split: 1: train/0.png = copy0.png"
    assert find(findings, "near duplicates").detail == f"1 {how}: train/0.png = copy0.png"
    assert find(findings, "duplicates under different patients").detail.startswith("1: train/0.png = copy0.png")
    assert find(findings, "duplicates with different labels").ok


def test_the_same_file_in_train_and_test_is_a_leak_without_any_image_decoded() -> None:
    table = digested(np.zeros((12, 1, 1), np.uint8))
    table.loc[8, "digest"] = "d0"
    (leak,) = leaks(audit(table, {}))
    assert leak.line() == "WARN identical files in more than one split: 1: train/0.png = test/8.png"


def test_one_patient_on_both_sides_is_a_leak() -> None:
    table = sound()
    table.loc[5, "group"] = "train1"
    assert [leak.check for leak in leaks(audit(table, {}))] == ["patients in more than one split"]


def test_identical_files_within_a_split_are_counted_but_no_leak() -> None:
    table = digested(np.zeros((12, 1, 1), np.uint8))
    table["digest"] = ["d0", "d1", "d0", "d1", "d4", "d5", "d4", *table["digest"][7:]]
    findings = audit(table, {})
    assert find(findings, "identical files").line() == (
        "WARN identical files: 3 groups (train 2, val 1), 3 redundant images"
    )
    assert leaks(findings) == []


def test_duplicates_with_different_labels_are_listed(films: Images) -> None:
    table = digested(films)
    table.loc[1, "digest"] = "d0"
    assert find(audit(table, {}), "duplicates with different labels").line() == (
        "WARN duplicates with different labels: 1: train/0.png = train/1.png"
    )
    images = films.copy()
    images[1] = saved_again(films[0])
    assert not find(audit(digested(images), {}, images=images), "duplicates with different labels").ok


def test_of_many_duplicates_only_a_few_are_listed() -> None:
    table = digested(np.zeros((12, 1, 1), np.uint8))
    table["digest"] = [f"d{n % 6}" for n in range(12)]
    said = find(audit(table, {}), "identical files in more than one split").detail
    assert said == "6: train/0.png = val/6.png; train/1.png = val/7.png; train/2.png = test/8.png; …"


def write_films(root: Path, larger: str, count: int = 30) -> pd.DataFrame:
    """A folder of `count` small noisy films for each class in train, those of class `larger` 70 pixels wide, not 64."""
    rng = np.random.default_rng(0)
    for split, films in (("train", count), ("val", 2), ("test", 2)):
        for name in ("NORMAL", "PNEUMONIA"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(films):
                size = (70, 64) if name == larger else (64, 64)
                noise = Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).resize(size)
                noise.save(folder / f"{split}-{n}.jpeg", quality=int(rng.integers(50, 90)))
    return assign_splits(index_folder(root), "official", 0.1, 0)


def test_a_class_of_larger_images_is_a_shortcut_and_unrelated_cues_are_not(tmp_path: Path) -> None:
    finding = find(audit(write_films(tmp_path, "PNEUMONIA"), {}, root=tmp_path), "shortcuts")
    assert not finding.ok
    assert "width 1.00" in finding.detail
    assert "height 0.50" in finding.detail
    assert finding.detail.endswith("(a model may learn width and aspect ratio)")


def test_classes_with_the_same_acquisition_have_no_shortcut(tmp_path: Path) -> None:
    assert find(audit(write_films(tmp_path, "neither"), {}, root=tmp_path), "shortcuts").ok


def test_the_test_split_is_not_searched_for_shortcuts(tmp_path: Path) -> None:
    table = write_films(tmp_path, "PNEUMONIA").assign(split="test")
    alike = write_films(tmp_path / "alike", "neither", 8).assign(split="train")
    alike["path"] = "alike/" + alike["path"]
    both = pd.concat([alike, table], ignore_index=True)
    assert find(audit(both, {}, root=tmp_path), "shortcuts").ok


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        ({"test"}, "validation does not represent test"),
        ({"val"}, "validation differs from train"),
        ({"val", "test"}, "validation and test both differ from train"),
        (set(), "train and test NORMAL"),
    ],
)
def test_a_shift_between_splits_is_reported_with_its_consequence(moved: set[str], said: str) -> None:
    table = manifest(
        [(split, y, f"{split}{y}{n}") for split in ("train", "val", "test") for y in (0, 1) for n in range(60)]
    )
    features = (
        np.random.default_rng(0).normal(size=(len(table), 4)) + 2 * table["split"].isin(moved).to_numpy()[:, None]
    )
    finding = find(audit(table, {}, features=features.astype(np.float32)), "shift between splits")
    assert finding.ok == (not moved)
    assert said in finding.detail


def test_splits_too_small_to_compare_are_inconclusive() -> None:
    finding = find(audit(sound(), {}, features=np.zeros((6, 2), np.float32)), "shift between splits")
    assert finding.line() == "?    shift between splits: inconclusive, too few images in val and test"


def test_images_or_features_of_another_data_set_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows for 6 images"):
        audit(sound(), {}, images=np.zeros((5, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="7 rows for 6 images"):
        audit(sound(), {}, features=np.zeros((7, 2), np.float32))
