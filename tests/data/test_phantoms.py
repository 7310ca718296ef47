"""The phantom data set: files, reproducibility, and that only pathology separates the classes."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr.data import phantoms as synthetic
from cxr.data.phantoms import Kind, draw_anatomy, phantom, write_synthetic

SMALL: dict[str, Any] = {"train_patients": 12, "test_patients": 6, "size": 40}
ILL: tuple[Kind, ...] = ("bacteria", "virus")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def patient_of(stem: str) -> str:
    return stem.rsplit("-", 1)[0] if "IM-" in stem else stem.rsplit("_", 1)[0]


def pair(seed: int, kind: Kind, size: int = 96) -> tuple[synthetic.GrayBytes, synthetic.GrayBytes]:
    healthy, ill = (phantom(np.random.default_rng(seed), k, size) for k in ("normal", kind))
    return healthy, ill


def pairwise_auc(low: list[float], high: list[float]) -> float:
    return float(np.mean(np.asarray(high)[:, None] > np.asarray(low)[None, :]))


@pytest.mark.parametrize("size", [32, 65, 224])
def test_phantom_has_the_requested_size_and_a_wide_range(size: int) -> None:
    film = phantom(np.random.default_rng(0), "normal", size)
    assert film.shape == (size, size)
    assert film.dtype == np.uint8
    assert np.percentile(film, 98) - np.percentile(film, 2) > 100


def test_phantom_rejects_a_size_too_small_to_draw() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        phantom(np.random.default_rng(0), "normal", 31)


def test_phantom_is_reproducible_and_changes_with_the_seed() -> None:
    first, again, other = (phantom(np.random.default_rng(seed), "virus", 64) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_anatomy_shapes_the_film() -> None:
    anatomy = draw_anatomy(np.random.default_rng(0))
    wide = replace(anatomy, lung_width=anatomy.lung_width * 1.2)
    films = [phantom(np.random.default_rng(1), "normal", 64, a).astype(float) for a in (anatomy, wide)]
    assert np.abs(films[0] - films[1]).mean() > 1


def test_films_of_one_patient_are_more_similar_than_those_of_two() -> None:
    rng = np.random.default_rng(3)
    patients = [draw_anatomy(rng) for _ in range(8)]
    films = np.stack([[phantom(rng, "normal", 48, a).ravel() for _ in range(3)] for a in patients]).astype(float)
    likeness = np.corrcoef(films.reshape(24, -1)).reshape(8, 3, 8, 3)
    within = np.mean([likeness[i, 0, i, 1] for i in range(8)])
    between = np.mean([likeness[i, 0, j, 1] for i in range(8) for j in range(8) if i != j])
    assert within > between + 0.01


@pytest.mark.parametrize("kind", ILL)
def test_pathology_changes_the_lungs_and_not_the_rest(kind: Kind) -> None:
    change = np.mean([np.abs(np.subtract(*pair(seed, kind), dtype=float)) for seed in range(12)], axis=0)
    lungs = change[30:66, 20:76]
    rim = np.concatenate([change[:6].ravel(), change[-6:].ravel(), change[:, :4].ravel(), change[:, -4:].ravel()])
    assert lungs.mean() > 3
    assert rim.mean() < 0.02 * lungs.mean()


@pytest.mark.parametrize("kind", ILL)
def test_pathology_makes_the_lungs_brighter(kind: Kind) -> None:
    gains = []
    for seed in range(12):
        healthy, ill = pair(seed, kind)
        gains.append(ill.astype(float).mean() - healthy.astype(float).mean())
    assert np.mean(np.asarray(gains) > 0) >= 0.9


def test_bacteria_are_more_focal_than_viruses() -> None:
    def evenness(kind: Kind) -> float:
        shares = []
        for seed in range(12):
            change = np.abs(np.subtract(*pair(seed, kind), dtype=float))
            halves = change[:, :48].sum(), change[:, 48:].sum()
            shares.append(min(halves) / max(halves))
        return float(np.mean(shares))

    assert evenness("virus") > evenness("bacteria") + 0.2


def test_brightness_alone_does_not_separate_the_classes() -> None:
    rng = np.random.default_rng(0)
    normal = [phantom(rng, "normal", 48).mean() for _ in range(100)]
    ill = [phantom(rng, kind, 48).mean() for kind in ILL for _ in range(50)]
    assert 0.3 < pairwise_auc(normal, ill) < 0.75


def test_write_is_byte_identical_for_the_same_seed(tmp_path: Path) -> None:
    first, again = write_synthetic(tmp_path / "a", **SMALL), write_synthetic(tmp_path / "b", **SMALL)
    assert digests(first) == digests(again)
    other = write_synthetic(tmp_path / "c", seed=1, **SMALL)
    assert digests(first) != digests(other)


def test_write_uses_the_kaggle_layout_and_file_names(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path, **SMALL)
    assert folder == tmp_path / "chest_xray"
    for split in ("train", "val", "test"):
        normal = [path.name for path in (folder / split / "NORMAL").iterdir()]
        ill = [path.name for path in (folder / split / "PNEUMONIA").iterdir()]
        assert normal
        assert ill
        pattern = r"(NORMAL2-)?IM-\d{4}-\d{4}\.jpeg"
        assert all(re.fullmatch(pattern, name) for name in normal)
        assert all(re.fullmatch(r"person\d+_(bacteria|virus)_\d+\.jpeg", name) for name in ill)


def test_write_saves_grey_jpegs_of_the_requested_size(tmp_path: Path) -> None:
    for path in write_synthetic(tmp_path, **SMALL).rglob("*.jpeg"):
        with Image.open(path) as film:
            assert (film.format, film.mode, film.size) == ("JPEG", "L", (40, 40))


def test_write_keeps_the_class_balance(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path, train_patients=80, test_patients=60, size=32)
    count = {
        (split, name): len(list((folder / split).glob(pattern)))
        for split in ("train", "val", "test")
        for name, pattern in (("normal", "NORMAL/*"), ("ill", "PNEUMONIA/*"), ("bacteria", "*/*_bacteria_*"))
    }
    assert count["train", "ill"] / count["train", "normal"] == pytest.approx(3, rel=0.15)
    assert count["train", "bacteria"] / count["train", "ill"] == pytest.approx(2 / 3, abs=0.06)
    assert count["test", "ill"] / (count["test", "ill"] + count["test", "normal"]) == pytest.approx(0.62, abs=0.05)
    assert (count["val", "normal"], count["val", "ill"]) == (8, 8)
    assert 140 <= count["train", "ill"] + count["train", "normal"] <= 180


def test_no_patient_is_in_two_splits_and_each_has_one_to_four_films(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path, **SMALL)
    films: dict[str, list[str]] = {}
    for path in folder.rglob("*.jpeg"):
        films.setdefault(patient_of(path.stem), []).append(path.parent.parent.name)
    assert all(len(set(splits)) == 1 for splits in films.values())
    assert all(1 <= len(splits) <= 4 for splits in films.values())
    assert sum("train" in splits for splits in films.values()) == SMALL["train_patients"]


def test_an_interrupted_write_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*args: Any) -> synthetic.GrayBytes:
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return phantom(*args)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "phantom", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert write_synthetic(tmp_path, **SMALL).is_dir()


def test_a_second_call_returns_without_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_synthetic(tmp_path, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(synthetic, "phantom", lambda *_: pytest.fail("drew again"))
    assert write_synthetic(tmp_path, **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"size": 48}, {"train_patients": 13}, {"test_patients": 7}])
def test_different_parameters_are_rejected(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_synthetic(tmp_path, **SMALL)
    before = digests(folder)
    with pytest.raises(ValueError, match="was written with"):
        write_synthetic(tmp_path, **(SMALL | change))
    assert digests(folder) == before


def test_a_folder_that_is_not_synthetic_is_not_changed(tmp_path: Path) -> None:
    real = tmp_path / "chest_xray" / "train" / "NORMAL" / "IM-0115-0001.jpeg"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a patient's film")
    with pytest.raises(FileExistsError, match="not a synthetic"):
        write_synthetic(tmp_path, **SMALL)
    assert real.read_bytes() == b"a patient's film"


def test_concurrent_calls_agree_on_one_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: write_synthetic(tmp_path, **SMALL), range(2)))
    assert folders[0] == folders[1]
    assert [path.name for path in tmp_path.iterdir()] == ["chest_xray"]


def test_too_few_patients_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least"):
        write_synthetic(tmp_path, train_patients=3, test_patients=6, size=40)
    assert list(tmp_path.iterdir()) == []
