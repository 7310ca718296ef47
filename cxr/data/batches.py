"""Dataset and DataLoader over the store, and batches ready for the network."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cxr.data.store import Store
from cxr.data.views import PLAIN, STRESS_SETS, Batch, View, augment, image_key, to_input

Item = tuple[Tensor, Tensor, Tensor]
MAKING = threading.Lock()  # held while a batch is made ahead: pinning memory would spoil a CUDA graph's recording
AHEAD = 3  # batches gathered before a GPU asks for them


class XrayDataset(Dataset[Item]):
    """The decoded images of one split: (uint8 [s, s], label, position in the split).

    `images` is the store's [rows, s, s], `rows` [n] says which of them belong, `labels` [n] are 0 or 1.
    """

    def __init__(self, images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]):
        self.images, self.rows, self.labels = images, rows, labels
        self._resident: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def resident(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(images uint8 [n, s, s], labels [n]) of the whole split on a device, moved there once."""
        if device not in self._resident:
            images = torch.from_numpy(np.ascontiguousarray(self.images[self.rows]))
            self._resident[device] = images.to(device), torch.from_numpy(self.labels).to(device)
        return self._resident[device]

    def is_on(self, device: torch.device) -> bool:
        """Whether the device holds the split already."""
        return device in self._resident

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        images, labels, positions = self.__getitems__([index])
        return images[0], labels[0], positions[0]

    def __getitems__(self, indices: list[int]) -> Item:
        """A whole batch in one gather: DataLoader calls this instead of `__getitem__` for each image."""
        images = torch.from_numpy(self.images[self.rows[indices]])
        return images, torch.from_numpy(self.labels[indices]), torch.tensor(indices)


@dataclass(frozen=True, slots=True)
class Split:
    """One split, ready to iterate: `keys` [n] identify the images, `labels` [n] are 0 or 1; `store` is its key."""

    dataset: XrayDataset
    keys: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.int64]
    store: str = ""

    def __len__(self) -> int:
        return len(self.labels)


def make_split(manifest: pd.DataFrame, store: Store, name: str) -> Split:
    """The images of the manifest's split `name`, in the manifest's order. Every digest must be in the store."""
    part = manifest[manifest["split"] == name]
    rows = np.array([store.rows[digest] for digest in part["digest"]], np.int64)
    keys = np.array([image_key(digest) for digest in part["digest"]], np.uint64)
    labels = np.array(part["label"], np.int64)
    return Split(XrayDataset(store.images, rows, labels), keys, labels, store.key)


def part_of(split: Split, positions: npt.NDArray[np.int64]) -> Split:
    """The images of a split at these positions, as a split."""
    dataset = XrayDataset(split.dataset.images, split.dataset.rows[positions], split.labels[positions])
    return Split(dataset, split.keys[positions], split.labels[positions], split.store)


def stressed_parts(val: Split, train_images: int, stress_set: str) -> dict[View, Split]:
    """The view of each stress of a set -> the validation images that are shown under it.

    A pass through all of them may cost a tenth of an epoch of training, whose step takes three forward passes: so each
    image is shown under every k-th stress, k as small as possible, in turn within each class. `stresses-1`, made before
    that rule, shows every image under every stress.
    """
    names, most = STRESS_SETS[stress_set], 0.1 * 3 * train_images
    wanted = 1 if stress_set == "stresses-1" else math.ceil(len(val) * len(names) / most)
    every = min(wanted, len(names), len(val))
    turns = _ranks(val) % every
    return {View(stress=name): part_of(val, np.flatnonzero(turns == index % every)) for index, name in enumerate(names)}


def stress_sizes(parts: Mapping[View, Split]) -> dict[str, int]:
    """Name of each stress -> how many images are shown under it."""
    return {str(view.stress): len(part) for view, part in parts.items()}


def _ranks(split: Split) -> npt.NDArray[np.int64]:
    """The place [n] of each image by class and key: the same whatever the order of the split."""
    return np.argsort(np.lexsort((split.keys, split.labels)))


def epoch_order(images: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of one epoch as positions in the split: a function of (seed, epoch) alone.

    A last batch of one image is left out: BatchNorm cannot train on it where the feature map is one pixel.
    """
    order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(images))
    return [batch for batch in torch.split(order, batch_size) if len(batch) > 1]


def straight_order(split: Split, batch_size: int) -> list[Tensor]:
    """The batches of a pass in the split's own order."""
    return list(torch.split(torch.arange(len(split)), batch_size))


def to_device(order: list[Tensor], device: torch.device) -> list[Tensor]:
    """The batches of an order on a device, by one transfer: one for each batch would stall a GPU in every step."""
    if device.type == "cpu" or not order:
        return order
    return list(torch.split(torch.cat(order).to(device), [len(batch) for batch in order]))


def _load(split: Split, order: list[Tensor], device: torch.device) -> DataLoader[Item]:
    return DataLoader(
        split.dataset,
        batch_sampler=[batch.tolist() for batch in order],
        pin_memory=device.type == "cuda",
        collate_fn=_as_it_is,
    )


def fits_on(device: torch.device, split: Split) -> bool:
    """Whether a GPU has four times the memory free that the split's images take; a CPU has no use for a copy."""
    if device.type != "cuda":
        return False
    free: int = torch.cuda.mem_get_info(device)[0]
    side = int(split.dataset.images.shape[1])
    return 4 * len(split) * side * side < free


def _resident_items(split: Split, order: list[Tensor], device: torch.device) -> Iterator[Item]:
    """As `_load`, from the device's own memory."""
    images, labels = split.dataset.resident(device)
    for index in to_device(order, device):
        yield images[index], labels[index], index


def _as_it_is(batch: Any) -> Any:
    return batch


def view_batches(split: Split, order: list[Tensor], seed: int, view: View, device: torch.device) -> Iterator[Batch]:
    """(inputs float32 [b, 3, s, s], labels int64 [b]) of one view on `device`, in the given order."""
    for images, labels in grey_batches(split, order, seed, view, device):
        yield to_input(images), labels


def grey_batches(split: Split, order: list[Tensor], seed: int, view: View, device: torch.device) -> Iterator[Batch]:
    """As `view_batches`, before normalisation: whole grey levels [b, s, s], uint8 or float32."""
    table = view.parameters(seed, split.keys)
    parameters = None if table is None else torch.from_numpy(table).to(device)
    for images, labels, positions in _items(split, order, device):
        images = images.to(device, non_blocking=True)
        seen = images if parameters is None else augment(images, parameters[positions.to(device, non_blocking=True)])
        yield seen, labels.to(device, non_blocking=True)


def _items(split: Split, order: list[Tensor], device: torch.device) -> Iterable[Item]:
    if split.dataset.is_on(device) or fits_on(device, split):
        return _resident_items(split, order, device)
    items = _load(split, order, device)
    return _ahead(items) if device.type == "cuda" else items


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same, the next ones made in a thread while the one given is in use."""
    source = iter(items)

    def make() -> Item | None:
        with MAKING:
            return next(source, None)

    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(make) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(make))
            yield item


def eval_batches(split: Split, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """(inputs, labels) as in `view_batches`: every image once, in order, without augmentation."""
    return view_batches(split, straight_order(split, batch_size), 0, PLAIN, device)
