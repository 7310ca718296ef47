"""Patients, names and the depth of a data set's files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicoms import SECRETS, as_dicoms, encoded, radiograph
from PIL import Image
from small import small

from cxr.config import TrainConfig
from cxr.data import headers
from cxr.data.headers import read_headers, with_patients
from cxr.data.kaggle import index_folder
from cxr.data.load import read_data
from cxr.storage import Cache


@pytest.fixture(scope="module")
def radiographs(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_dicoms(phantoms, tmp_path_factory.mktemp("dicom"))


@pytest.fixture
def deep(phantoms: Path, tmp_path: Path) -> Path:
    """The phantoms as PNG files of 12 bits in 16."""
    for file in phantoms.glob("*/*/*.jpeg"):
        target = (tmp_path / "deep" / file.relative_to(phantoms)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 16).save(target)
    return tmp_path / "deep"


def config(folder: Path, **options: str) -> TrainConfig:
    return small(TrainConfig, folder, **options)


def test_jpeg_files_keep_their_names_groups_and_store(phantoms: Path, own_cache: Path) -> None:
    table = index_folder(phantoms)
    found = read_headers(phantoms, table, Cache.open())
    assert found.table.equals(table)
    assert list(found.files) == list(table["path"])
    assert list(found.groups.values()) == list(table["group"])
    assert found.reading.format.startswith("2-pillow")
    assert not (own_cache / "patients.key").exists()


def test_12_bits_in_16_are_found_once_for_a_data_set(
    deep: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, eight = read_data(config(deep)), read_data(config(phantoms))
    assert data.depth == 12
    assert data.store.key.split("/")[1].startswith("12bit-")
    pairs = zip(data.manifest["digest"], eight.manifest["digest"], strict=True)
    gaps = [
        np.abs(data.store.images[data.store.rows[a]].astype(int) - eight.store.images[eight.store.rows[b]]).max()
        for a, b in pairs
    ]
    assert max(gaps) <= 1
    assert len({read_data(config(deep, depth=depth)).fingerprint for depth in ("auto", "12", "16")}) == 2
    monkeypatch.setattr(headers, "largest_value", None)  # it would be called
    assert read_data(config(deep)).depth == 12


def test_a_damaged_depth_is_found_again(deep: Path, own_cache: Path) -> None:
    table = index_folder(deep)
    (deep / "train" / "NORMAL" / "broken.png").write_bytes((deep / table["path"][0]).read_bytes()[:200])
    table = index_folder(deep)
    for text in ("", "{}", '{"largest": 70000}'):
        assert read_headers(deep, table, Cache.open()).reading.depth == 12
        for file in own_cache.glob("depths/*"):
            file.write_text(text)


def test_dicom_files_are_named_by_their_digest_and_patients_by_a_keyed_hash(radiographs: Path) -> None:
    table = index_folder(radiographs)
    found = read_headers(radiographs, table, Cache.open())
    assert found.reading.hidden
    for name, file in found.files.items():
        assert hashlib.sha256(Path(file).read_bytes()).hexdigest().startswith(name)
    text = found.table.to_csv() + repr(found.groups)
    assert [secret for secret in SECRETS if secret in text] == []
    assert 10 < len(set(found.groups.values())) == found.table["group"].nunique() < len(table)
    plain = read_headers(radiographs, table, Cache.open(), "plain")
    assert list(plain.table["path"]) == list(table["path"])
    assert list(plain.groups.values()) == list(found.groups.values())


def test_a_split_does_not_depend_on_the_key(radiographs: Path, tmp_path: Path) -> None:
    tables = [read_data(config(radiographs, cache_dir=str(tmp_path / name))) for name in ("one", "two")]
    assert tables[0].fingerprint == tables[1].fingerprint
    assert set(tables[0].manifest["group"]).isdisjoint(tables[1].manifest["group"])
    assert (tables[0].manifest.groupby("group")["split"].nunique() == 1).all()
    folds = [read_data(config(radiographs, cache_dir=str(tmp_path / name), fold="1/3")) for name in ("one", "two")]
    assert folds[0].fingerprint == folds[1].fingerprint


def test_hiding_paths_changes_no_split(phantoms: Path) -> None:
    plain, hidden = read_data(config(phantoms)), read_data(config(phantoms, paths="hashed"))
    assert plain.fingerprint == hidden.fingerprint
    assert plain.store.key == hidden.store.key
    assert list(plain.manifest["digest"]) == list(hidden.manifest["digest"])
    pairs = set(zip(plain.manifest["group"], hidden.manifest["group"], strict=True))
    assert len(pairs) == plain.manifest["group"].nunique() == hidden.manifest["group"].nunique()
    assert not any("person" in group or "IM" in group for group in hidden.manifest["group"])


def test_identical_and_unreadable_files_have_names_of_their_own(phantoms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    first = next(iter(sorted(folder.glob("train/NORMAL/*"))))
    shutil.copy(first, first.with_name("z-copy.jpeg"))
    (folder / "train" / "NORMAL" / "secret-folder.jpeg").mkdir()
    table = index_folder(folder)
    found = read_headers(folder, table, Cache.open(), "hashed")
    names = list(found.files)
    assert len(set(names)) == len(table)
    digest = hashlib.sha256(first.read_bytes()).hexdigest()[:16]
    assert {digest, f"{digest}-2"} <= set(names)
    assert not any("secret" in name or "unreadable" in name for name in names)
    assert sum(name == group for name, group in found.groups.items()) == (table["group"] == table["path"]).sum() > 0


def test_mixed_sets_and_files_without_a_patient(phantoms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(phantoms, tmp_path / "data"))
    pixels = np.full((64, 64), 90, np.uint8)
    (folder / "train" / "NORMAL" / "1.2.840.1").write_bytes(encoded(radiograph(pixels, PatientID="")))
    data = read_data(config(folder))
    assert data.manifest["mode"].str.startswith("MONOCHROME2").sum() == 1
    row = data.manifest[data.manifest["mode"].str.startswith("MONOCHROME2")].iloc[0]
    assert row["group"] == row["path"] == row["digest"][:16]


def test_a_patient_that_was_given_is_not_replaced_by_the_header(radiographs: Path) -> None:
    table = index_folder(radiographs)
    given = table.assign(group=["given", *table["group"][1:]])
    split = with_patients(radiographs, given, Cache.open().patient_key)
    assert (split["group"][0], split["patient"][0]) == ("given", "")
    assert (split["patient"][1:] != "").all()
    shown = list(read_headers(radiographs, given, Cache.open()).groups.values())
    assert shown[0] != "given"
    assert shown[1:] == list(split["patient"][1:])
