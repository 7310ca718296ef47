"""From store and manifest to batches: every image once, in the requested order and view."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cxr.data import batches as dataset
from cxr.data.batches import (
    Split,
    XrayDataset,
    epoch_order,
    eval_batches,
    make_split,
    part_of,
    straight_order,
    stressed_parts,
    view_batches,
)
from cxr.data.kaggle import index_folder
from cxr.data.splits import assign_splits
from cxr.data.store import Store, open_store
from cxr.data.views import PLAIN, STRESSES, View, augment, image_key, to_input, view_parameters
from cxr.storage import Cache

CPU = torch.device("cpu")


def make(count: int, size: int = 32) -> Split:
    """A split whose images are stored in a different order."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count + 3, size, size), np.uint8)
    rows = rng.permutation(count + 3)[:count]
    labels = np.arange(count) % 2
    return Split(XrayDataset(images, rows, labels), rng.integers(0, 2**64, count, np.uint64), labels)


@settings(max_examples=60)
@given(st.integers(0, 200), st.integers(2, 70), st.integers(0, 10**9), st.integers(0, 300))
def test_an_epoch_has_every_image_once_without_a_last_batch_of_one(n: int, batch_size: int, seed: int, e: int) -> None:
    batches = epoch_order(n, batch_size, seed, e)
    seen = torch.cat([*batches, torch.empty(0, dtype=torch.int64)]).tolist()
    assert len(seen) == len(set(seen)) == n - (n % batch_size == 1)
    assert set(seen) <= set(range(n))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(2 <= len(batch) <= batch_size for batch in batches)


def test_the_order_depends_on_seed_and_epoch() -> None:
    orders = [torch.cat(epoch_order(50, 8, *of)).tolist() for of in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])


def test_an_image_left_out_of_one_epoch_is_in_another() -> None:
    seen = set().union(*(torch.cat(epoch_order(9, 8, 0, epoch)).tolist() for epoch in range(10)))
    assert seen == set(range(9))


def test_sequential_order_keeps_a_last_batch_of_one() -> None:
    assert [batch.tolist() for batch in straight_order(make(5), 2)] == [[0, 1], [2, 3], [4]]


def test_an_item_and_a_batch_give_image_label_and_position() -> None:
    data = make(6).dataset
    image, label, position = data[4]
    assert image.dtype == torch.uint8
    assert (int(label), int(position)) == (0, 4)
    np.testing.assert_array_equal(image, data.images[data.rows[4]])
    images, labels, positions = data.__getitems__([4, 1])
    assert torch.equal(images[0], image)
    assert (labels.tolist(), positions.tolist()) == ([0, 1], [4, 1])


def test_batches_are_in_the_given_order_and_not_augmented_without_a_view() -> None:
    split = make(6)
    order = [torch.tensor([5, 0]), torch.tensor([3])]
    batches = list(view_batches(split, order, 0, PLAIN, CPU))
    assert [labels.tolist() for _, labels in batches] == [[1, 0], [1]]
    for (inputs, _), positions in zip(batches, order, strict=True):
        stored = torch.from_numpy(split.dataset.images[split.dataset.rows[positions.numpy()]])
        assert torch.equal(inputs, to_input(stored))


def test_an_image_is_the_same_in_any_order_and_batch() -> None:
    split = make(6)
    straight = torch.cat([x for x, _ in view_batches(split, straight_order(split, 6), 1, View(2), CPU)])
    order = [torch.tensor([5, 0, 3, 1]), torch.tensor([2, 4])]
    shuffled = torch.cat([x for x, _ in view_batches(split, order, 1, View(2), CPU)])
    assert torch.equal(shuffled, straight[torch.cat(order)])


def test_a_view_depends_on_the_key_of_the_image() -> None:
    split = make(3)
    ((inputs, _),) = view_batches(split, straight_order(split, 3), 7, View(1), CPU)
    stored = torch.from_numpy(split.dataset.images[split.dataset.rows])
    expected = to_input(augment(stored, torch.from_numpy(view_parameters(7, split.keys, 1))))
    assert torch.equal(inputs, expected)


@pytest.mark.parametrize(("seed", "view"), [(1, 0), (0, 1)])
def test_a_different_seed_or_view_gives_different_images(seed: int, view: int) -> None:
    split = make(2)
    ((first, _),) = view_batches(split, straight_order(split, 2), 0, View(0), CPU)
    ((other, _),) = view_batches(split, straight_order(split, 2), seed, View(view), CPU)
    assert not torch.equal(first, other)


def test_evaluation_sees_every_image_once_in_order() -> None:
    split = make(5)
    batches = list(eval_batches(split, 2, CPU))
    stored = torch.from_numpy(split.dataset.images[split.dataset.rows])
    assert torch.equal(torch.cat([x for x, _ in batches]), to_input(stored))
    assert torch.cat([y for _, y in batches]).tolist() == split.labels.tolist()


@pytest.fixture
def real(phantoms: Path, own_cache: Path) -> tuple[pd.DataFrame, Store]:
    table = assign_splits(index_folder(phantoms), "grouped", 0.2, 0)
    files = [phantoms / path for path in table["path"]]
    return table, open_store(files, list(table["digest"]), 32, "squash", Cache(own_cache))


def test_the_splits_of_a_folder_have_its_images_in_the_order_of_the_manifest(real: tuple[pd.DataFrame, Store]) -> None:
    table, store = real
    splits = {name: make_split(table, store, name) for name in ("train", "val", "test")}
    assert sum(len(split) for split in splits.values()) == len(table)
    for name, split in splits.items():
        part = table[table["split"] == name].reset_index(drop=True)
        assert split.labels.tolist() == part["label"].tolist()
        assert [int(key) for key in split.keys] == [image_key(digest) for digest in part["digest"]]
        last = part["digest"].iloc[-1]
        np.testing.assert_array_equal(split.dataset[len(part) - 1][0], store.images[store.rows[last]])


def test_an_image_without_a_row_is_not_skipped_silently(real: tuple[pd.DataFrame, Store]) -> None:
    table, store = real
    table.loc[table.index[table["split"] == "val"][0], "digest"] = "0" * 64
    with pytest.raises(KeyError):
        make_split(table, store, "val")


def test_a_split_of_no_images_gives_no_batches(real: tuple[pd.DataFrame, Store]) -> None:
    empty = make_split(real[0], real[1], "no such split")
    assert len(empty) == 0
    assert epoch_order(len(empty), 8, 0, 0) == []


def test_batches_from_device_memory_are_the_same(splits: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch) -> None:
    """The code path of a GPU, on the CPU."""
    train, cpu = splits[0], torch.device("cpu")
    order = epoch_order(len(train), 8, 3, 0)
    loaded = list(view_batches(train, order, 3, View(1), cpu))
    monkeypatch.setattr(dataset, "fits_on", lambda device, split: True)
    monkeypatch.setattr(dataset, "_load", lambda *arguments: pytest.fail("went through the loader"))
    for (images, labels), (others, again) in zip(loaded, view_batches(train, order, 3, View(1), cpu), strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, again)


def test_prefetched_batches_are_the_same_and_errors_reach_the_consumer() -> None:
    items = [(torch.tensor([n]), torch.tensor([n]), torch.tensor([n])) for n in range(7)]
    assert list(dataset._ahead(items)) == items
    assert next(dataset._ahead(items)) == items[0]  # who stops early gets no more

    def broken() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield items[0]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(dataset._ahead(broken()))


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3000), st.integers(0, 10**6))
def test_stressed_validation_costs_a_tenth_of_training_and_shows_every_image(
    normal: int, pneumonia: int, train: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation([0] * normal + [1] * pneumonia).astype(np.int64)
    keys = np.random.default_rng(seed).permutation(len(labels)).astype(np.uint64)
    images = np.zeros((len(labels), 2, 2), np.uint8)
    split = Split(XrayDataset(images, np.arange(len(labels)), labels), keys, labels)
    parts = stressed_parts(split, train, "stresses-2")
    assert {view.stress for view in parts} == set(STRESSES)
    assert min(len(part) for part in parts.values()) > 0
    shown = np.concatenate([part.keys for part in parts.values()])
    assert set(shown) == set(keys)
    counts = np.unique(shown, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert len(shown) <= max(0.3 * train, len(split)) + 2 * len(parts)  # but for the remainder of each class
    whole = stressed_parts(split, train, "stresses-1")
    assert [len(part) for part in whole.values()] == [len(split)] * 6


def test_which_images_are_shown_under_a_stress_does_not_depend_on_their_order(splits: tuple[Split, Split]) -> None:
    val = splits[1]
    reverse = part_of(val, np.arange(len(val))[::-1].copy())
    for view, part in stressed_parts(val, 20, "stresses-2").items():
        assert set(part.keys) == set(stressed_parts(reverse, 20, "stresses-2")[view].keys)
