"""Folder -> manifest -> splits: indexing, rejected folders, and that no patient is in two splits."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr.data.kaggle import digest_files, find_root, index_folder, parse_name
from cxr.data.splits import assign_splits, fingerprint, grouped_holdout
from cxr.errors import UserError

NAMES = {"NORMAL": "IM-{n:04}-0001.jpeg", "PNEUMONIA": "person{n}_bacteria_{n}.jpeg"}


def fill(root: Path, splits: tuple[str, ...] = ("train", "val", "test"), images: int = 2) -> Path:
    """Files with the right names; indexing never decodes, so their bytes need not be images."""
    for place, split in enumerate(splits):
        for name, pattern in NAMES.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(images):
                number = 10 * place + n
                (folder / pattern.format(n=number)).write_bytes(f"{name} {number}".encode())
    return root


def test_finds_the_folder_itself_and_once_or_twice_nested(tmp_path: Path) -> None:
    for top in ("plain", "once/chest_xray", "twice/chest_xray/chest_xray"):
        fill(tmp_path / top)
        assert find_root(tmp_path / top.split("/")[0]) == tmp_path / top


def test_finds_a_relative_and_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_root("data") == find_root("~/data") == tmp_path / "data"


def test_the_outer_folder_takes_precedence_over_a_nested_copy(tmp_path: Path) -> None:
    fill(tmp_path / "chest_xray")
    fill(tmp_path / "chest_xray/chest_xray")
    assert find_root(tmp_path) == tmp_path / "chest_xray"


@pytest.mark.parametrize(
    ("where", "says"),
    [("gone", "no such folder"), ("file", "no such folder"), ("empty", "no train/"), ("x" * 5000, "cannot be read")],
)
def test_an_unusable_data_folder_is_rejected_by_name(tmp_path: Path, where: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=says) as caught:
        find_root(tmp_path / where)
    assert str(tmp_path / where) in str(caught.value)


def test_an_unknown_home_folder_is_rejected() -> None:
    with pytest.raises(UserError, match=r"--data-dir ~no-such-user/x: cannot be read"):
        find_root("~no-such-user/x")


def test_manifest_has_a_row_for_each_image(tmp_path: Path) -> None:
    table = index_folder(fill(tmp_path))
    assert len(table) == 12
    assert list(table["path"])[:2] == ["train/NORMAL/IM-0000-0001.jpeg", "train/NORMAL/IM-0001-0001.jpeg"]
    assert [y == 1 for y in table["label"]] == ["/PNEUMONIA/" in path for path in table["path"]]
    assert list(table["official"]) == [path.split("/")[0] for path in table["path"]]
    assert set(table["subtype"]) == {"normal", "bacteria"}
    assert table["digest"].str.fullmatch("[0-9a-f]{64}").all()


def test_only_the_known_suffixes_are_indexed_in_any_case(tmp_path: Path) -> None:
    folder = fill(tmp_path) / "train/NORMAL"
    for name in ("a.jpg", "b.png", "c.JPEG", "d.PNG", "e.txt", "f.dcm", "jpeg", "1.2.840"):
        (folder / name).write_bytes(name.encode())
    table = index_folder(tmp_path)
    added = {Path(path).name for path in table["path"]} - {NAMES["NORMAL"].format(n=n) for n in range(100)}
    assert {name for name in added if not name.startswith("person")} == {"a.jpg", "b.png", "c.JPEG", "d.PNG", "f.dcm"}


def test_macos_metadata_files_are_ignored(tmp_path: Path) -> None:
    clean = index_folder(fill(tmp_path))
    fill(tmp_path / "__MACOSX")
    for folder in (tmp_path, tmp_path / "train", tmp_path / "train/NORMAL"):
        (folder / ".DS_Store").touch()
        (folder / "._IM-0000-0001.jpeg").touch()
    (tmp_path / "train/__MACOSX").mkdir()
    pd.testing.assert_frame_equal(index_folder(tmp_path), clean)


def test_a_stray_file_next_to_the_class_folders_is_ignored(tmp_path: Path) -> None:
    (fill(tmp_path) / "train/README.txt").touch()
    assert len(index_folder(tmp_path)) == 12


def test_class_folders_may_be_in_any_case(tmp_path: Path) -> None:
    clean = index_folder(fill(tmp_path))
    (tmp_path / "test/NORMAL").rename(tmp_path / "test/Normal")
    assert list(index_folder(tmp_path).sort_values("digest")["label"]) == list(clean.sort_values("digest")["label"])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["NORMAL", "PNEUMONIA"])
@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_class_missing_from_train_or_test_is_rejected_with_its_folder(
    tmp_path: Path, split: str, name: str, left: str
) -> None:
    folder = fill(tmp_path) / split / name
    shutil.rmtree(folder)
    if left == "an empty folder":
        folder.mkdir()
    with pytest.raises(UserError, match=f"{folder}: contains no .jpeg"):
        index_folder(tmp_path)


def test_images_without_class_folders_are_rejected_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/IM-0001-0001.jpeg").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/train/NORMAL: contains no"):
        index_folder(tmp_path)


def test_an_unknown_class_folder_is_rejected_by_name(tmp_path: Path) -> None:
    (fill(tmp_path) / "test/COVID").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/test/COVID: not a class folder; .*NORMAL and PNEUMONIA"):
        index_folder(tmp_path)


def test_a_file_instead_of_a_class_folder_is_rejected_by_name(tmp_path: Path) -> None:
    shutil.rmtree(fill(tmp_path) / "val/NORMAL")
    (tmp_path / "val/NORMAL").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/val/NORMAL: cannot be read"):
        index_folder(tmp_path)


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Paths in this set cannot be read; implemented without chmod, which has no effect for root."""
    paths: set[Path] = set()

    def guard(method: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def guarded(path: Path) -> Any:
            if path in paths:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return method(path)

        return guarded

    monkeypatch.setattr(os, "listdir", guard(os.listdir))
    monkeypatch.setattr(Path, "read_bytes", guard(Path.read_bytes))
    return paths


def test_an_unreadable_folder_is_rejected_by_name(tmp_path: Path, forbidden: set[Path]) -> None:
    forbidden.add(fill(tmp_path) / "train/PNEUMONIA")
    with pytest.raises(UserError, match=f"{tmp_path}/train/PNEUMONIA: cannot be read .Permission denied"):
        index_folder(tmp_path)


def test_an_unreadable_file_is_indexed_with_an_unreadable_digest(tmp_path: Path, forbidden: set[Path]) -> None:
    file = fill(tmp_path) / "train/NORMAL/IM-0000-0001.jpeg"
    forbidden.add(file)
    digests = list(index_folder(tmp_path)["digest"])
    assert digests[0] == f"unreadable:{file}"
    assert not any(digest.startswith("unreadable") for digest in digests[1:])


def test_digests_follow_the_bytes_and_the_order(tmp_path: Path) -> None:
    for name, data in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(data)
    a, b, c, gone = digest_files(tmp_path / name for name in ("a", "b", "c", "gone"))
    assert a == c != b
    assert gone == f"unreadable:{tmp_path}/gone"


@pytest.mark.parametrize(
    ("name", "group", "subtype"),
    [
        ("person123_bacteria_45.jpeg", "person123_bacteria", "bacteria"),
        ("person123_virus_45.jpeg", "person123_virus", "virus"),
        ("IM-0115-0001.jpeg", "IM-0115", "normal"),
        ("IM-0115-0001-0002.jpeg", "IM-0115", "normal"),
        ("NORMAL2-IM-1427-0001.jpeg", "NORMAL2-IM-1427", "normal"),
        ("Person7_Virus_1.PNG", "person7_virus", "virus"),
        ("00001234_000.png", "train/NORMAL/00001234_000.png", "unknown"),
        ("personal.png", "train/NORMAL/personal.png", "unknown"),
    ],
)
def test_group_and_subtype_are_read_from_the_name(name: str, group: str, subtype: str) -> None:
    assert parse_name(f"train/NORMAL/{name}") == (group, subtype)


def test_official_split_is_the_folders(tmp_path: Path) -> None:
    table = index_folder(fill(tmp_path))
    assert list(assign_splits(table, "official", 0.1, 0)["split"]) == list(table["official"])
    assert "split" not in table


def test_grouped_split_pools_train_and_val_and_keeps_test(tmp_path: Path) -> None:
    table = index_folder(fill(tmp_path, images=10))
    split = assign_splits(table, "grouped", 0.25, 0)
    assert ((split["split"] == "test") == (table["official"] == "test")).all()
    assert split[split["split"] == "val"].groupby("label").size().tolist() == [5, 5]
    assert set(split.loc[split["split"] == "train", "official"]) == {"train", "val"}


def test_grouped_split_works_without_a_val_folder_and_official_does_not(tmp_path: Path) -> None:
    table = index_folder(fill(tmp_path, ("train", "test")))
    assert set(assign_splits(table, "grouped", 0.1, 0)["split"]) == {"train", "val", "test"}
    with pytest.raises(UserError, match="--val-split official: leaves no NORMAL image in val"):
        assign_splits(table, "official", 0.1, 0)


def test_a_class_of_one_patient_cannot_be_split(tmp_path: Path) -> None:
    table = index_folder(fill(tmp_path, ("train", "test"), images=1))
    with pytest.raises(UserError, match="--val-split grouped: leaves no NORMAL image in train"):
        assign_splits(table, "grouped", 0.1, 0)


def test_a_class_without_test_images_after_skipping_is_rejected(tmp_path: Path) -> None:
    table = index_folder(fill(tmp_path))
    table = table[(table["official"] != "test") | (table["label"] == 0)]
    with pytest.raises(UserError, match="no PNEUMONIA image in test"):
        assign_splits(table, "grouped", 0.3, 0)


@st.composite
def patients(draw: st.DrawFn) -> tuple[pd.Series, pd.Series]:
    """Groups of one class each and of unequal sizes, in a shuffled order."""
    sizes = [draw(st.lists(st.integers(1, 8), min_size=2, max_size=30)) for _ in range(2)]
    rows = [(f"{y}-{g}", y) for y in (0, 1) for g, size in enumerate(sizes[y]) for _ in range(size)]
    rows = draw(st.permutations(rows))
    return pd.Series([g for g, _ in rows]), pd.Series([y for _, y in rows])


@settings(max_examples=40)
@given(patients(), st.floats(0.01, 0.5), st.integers(0, 2**32))
def test_holdout_keeps_patients_together_and_the_fraction_of_each_class(
    data: tuple[pd.Series, pd.Series], fraction: float, seed: int
) -> None:
    groups, labels = data
    held = grouped_holdout(groups, labels, fraction, seed)
    assert held.shape == (len(groups),)
    assert not set(groups[held]) & set(groups[~held])
    np.testing.assert_array_equal(held, grouped_holdout(groups, labels, fraction, seed))
    for label in (0, 1):
        of_class = labels == label
        largest = groups[of_class].value_counts().max()
        taken = held[of_class].sum()
        assert taken > 0
        assert abs(taken - fraction * of_class.sum()) <= largest / 2 or len(set(groups[of_class & held])) == 1


@settings(max_examples=20)
@given(patients(), st.randoms(use_true_random=False))
def test_holdout_does_not_depend_on_the_order_of_rows(data: tuple[pd.Series, pd.Series], random: Random) -> None:
    groups, labels = data
    order = list(range(len(groups)))
    random.shuffle(order)
    held = grouped_holdout(groups, labels, 0.3, 0)
    np.testing.assert_array_equal(grouped_holdout(groups[order], labels[order], 0.3, 0), held[order])


def test_holdout_changes_with_the_seed_and_keeps_a_mixed_patient_together() -> None:
    groups = pd.Series([f"p{n // 2}" for n in range(80)])
    labels = pd.Series([0] * 39 + [1] * 41)  # p19 has one image of each class
    masks = [grouped_holdout(groups, labels, 0.5, seed) for seed in range(8)]
    assert len({mask.tobytes() for mask in masks}) > 1
    for mask in masks:
        assert mask[38] == mask[39]


def test_fingerprint_depends_on_images_labels_and_splits_but_not_their_order() -> None:
    table = pd.DataFrame({"digest": ["a", "b", "c"], "label": [0, 1, 1], "split": ["train", "val", "test"]})
    name = fingerprint(table)
    assert len(name) == 12
    assert fingerprint(table.sample(frac=1, random_state=1)) == name
    for column, value in (("digest", "z"), ("label", 1), ("split", "val")):
        other = table.copy()
        other.loc[0, column] = value
        assert fingerprint(other) != name
