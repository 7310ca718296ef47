"""Modified copies are detected, and different films are not mistaken for copies."""

import io
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxr.audit import duplicates as module
from cxr.audit.duplicates import SAME, UInt8, exact_duplicates, mixed, near_duplicates, pairs_of, pixel_duplicates
from cxr.data.phantoms import draw_anatomy, phantom
from cxr.data.store import Gathered

FILMS = 24


@pytest.fixture(scope="module")
def films() -> UInt8:
    """Films of 12 patients, two each: one healthy, one with pneumonia, [24, 96, 96]."""
    rng = np.random.default_rng(3)
    patients = [draw_anatomy(rng) for _ in range(FILMS // 2)]
    return np.stack([phantom(rng, kind, 96, patient) for patient in patients for kind in ("normal", "virus")])


def saved_again(film: UInt8) -> UInt8:
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, "JPEG", quality=40)
    return np.asarray(Image.open(buffer))


def mirrored(film: UInt8) -> UInt8:
    return film[:, ::-1]


def cropped(film: UInt8) -> UInt8:
    """3 to 5% cut from the sides, unequally, and resized."""
    side = film.shape[0]
    box = (0.03 * side, 0.05 * side, 0.955 * side, 0.965 * side)
    return np.asarray(Image.fromarray(film).resize((side, side), Image.Resampling.BILINEAR, box=box))


def brighter(film: UInt8) -> UInt8:
    return np.clip(film * 1.1 + 8, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (saved_again, "copy"),
        (brighter, "copy"),
        (mirrored, "mirrored"),
        (cropped, "cropped"),
        (lambda film: saved_again(cropped(mirrored(film))), "mirrored and cropped"),
    ],
)
def test_changed_copies_are_found_and_nothing_else(films: UInt8, change: Callable[[UInt8], UInt8], how: str) -> None:
    copies = np.stack([change(film) for film in films[:6]])
    found = near_duplicates(np.concatenate([films, copies]))
    assert found[["a", "b"]].to_numpy().tolist() == [[row, FILMS + row] for row in range(6)]
    assert set(found["how"]) == {how}
    assert found["correlation"].between(SAME, 1.001).all()


def test_a_crop_is_found_where_the_cropped_one_comes_first(films: UInt8) -> None:
    found = near_duplicates(np.concatenate([cropped(films[0])[None], films]))
    assert found[["a", "b"]].to_numpy().tolist() == [[0, 1]]


def test_a_crop_far_from_every_starting_point_is_fitted_closely(films: UInt8) -> None:
    corner = (0, 0, 0.95 * 96, 0.95 * 96)
    pictures = [Image.fromarray(film).resize((96, 96), Image.Resampling.BILINEAR, box=corner) for film in films]
    found = near_duplicates(np.concatenate([films, np.stack([np.asarray(picture) for picture in pictures])]))
    assert len(found) >= 6, "the hash proposes about half of them"
    assert (found["b"] == found["a"] + FILMS).all()
    assert found["correlation"].min() > 0.985


def test_different_films_are_no_duplicates(films: UInt8) -> None:
    assert near_duplicates(films).empty
    assert pixel_duplicates(films) == []


def test_identical_pixels_form_a_group_represented_by_its_first_image(films: UInt8) -> None:
    images = np.stack([films[0], films[1], films[0], saved_again(films[0]), films[0]])
    assert pixel_duplicates(images) == [[0, 2, 4]]
    assert near_duplicates(images)[["a", "b"]].to_numpy().tolist() == [[0, 3]]


def test_images_may_be_gathered_one_by_one(films: UInt8) -> None:
    store = np.concatenate([films[:4], np.stack([saved_again(film) for film in films[:4]])])
    gathered = Gathered(store, np.array([5, 0, 2, 1]))
    assert near_duplicates(gathered)[["a", "b"]].to_numpy().tolist() == [[0, 3]]
    assert pixel_duplicates(Gathered(store, np.array([3, 0, 3]))) == [[0, 2]]


@pytest.mark.parametrize("most", [1, 4, 9])
def test_of_many_candidates_the_most_similar_are_kept(films: UInt8, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """In whatever blocks they are found: here each block is larger than what is kept."""
    changed = [change(film) for film in films[:6] for change in (brighter, mirrored, cropped)]
    small = np.stack([module._shrink(film) for film in [*films, *changed]])
    whole = module._candidates(small)
    assert len(whole) > 12
    monkeypatch.setattr(module, "MAX_FITTED", most)
    pd.testing.assert_frame_equal(module._candidates(small), whole[:most])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_blank_or_few_images_are_no_duplicates(count: int) -> None:
    blank = np.stack([np.full((40, 40), 60 * n, np.uint8) for n in range(count)]) if count else np.zeros((0, 40, 40))
    found = near_duplicates(blank.astype(np.uint8))
    assert list(found) == ["a", "b", "correlation", "how"]
    assert found.empty


@given(st.lists(st.sampled_from("abcdef")))
def test_groups_hold_each_repeated_digest_once(digests: list[str]) -> None:
    groups = exact_duplicates(pd.DataFrame({"digest": digests}))
    rows = sorted(row for group in groups for row in group)
    assert rows == [row for row, digest in enumerate(digests) if digests.count(digest) > 1]
    assert all(len({digests[row] for row in group}) == 1 for group in groups)
    assert len(groups) == len({digests[row] for row in rows})
    assert len(pairs_of(groups)) == len(rows) - len(groups)


def test_mixed_keeps_the_groups_whose_rows_differ() -> None:
    values = pd.Series(["train", "train", "test"], index=[7, 8, 9])
    assert mixed([[0, 1], [1, 2], [0, 1, 2]], values) == [[1, 2], [0, 1, 2]]
