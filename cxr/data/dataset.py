"""Dataset and DataLoader over the store, and batches ready for the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cxr.data.augment import augment, image_key, to_input, view_parameters
from cxr.data.store import Store

Item = tuple[Tensor, Tensor, Tensor]


class XrayDataset(Dataset[Item]):
    """The decoded images of one split: (uint8 [s, s], label, position in the split).

    `images` is the store's [rows, s, s], `rows` [n] says which of them belong, `labels` [n] are 0 or 1.
    """

    def __init__(self, images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]):
        self.images, self.rows, self.labels = images, rows, labels

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
    """One split, ready to iterate: `keys` [n] identify the images, `labels` [n] are 0 or 1."""

    dataset: XrayDataset
    keys: npt.NDArray[np.uint64]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def make_split(manifest: pd.DataFrame, store: Store, name: str) -> Split:
    """The images of the manifest's split `name`, in the manifest's order. Every digest must be in the store."""
    part = manifest[manifest["split"] == name]
    rows = np.array([store.rows[digest] for digest in part["digest"]], np.int64)
    keys = np.array([image_key(digest) for digest in part["digest"]], np.uint64)
    labels = part["label"].to_numpy(np.int64)
    return Split(XrayDataset(store.images, rows, labels), keys, labels)


def _load(split: Split, batch_size: int, generator: torch.Generator | None, device: torch.device) -> DataLoader[Item]:
    return DataLoader(
        split.dataset,
        batch_size,
        shuffle=generator is not None,
        generator=generator,
        # BatchNorm cannot train on a single image whose last feature map is a single pixel.
        drop_last=generator is not None and len(split) % batch_size == 1,
        pin_memory=device.type == "cuda",
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def train_batches(
    split: Split, batch_size: int, seed: int, epoch: int, views: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs float32 [b, 3, s, s], labels int64 [b]) of one epoch on `device`, in an order of its own.

    Order and views are functions of (seed, epoch): epoch e shows view e mod `views`. 0 views: no augmentation.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    parameters = torch.from_numpy(view_parameters(seed, split.keys, epoch % views)) if views else None
    for images, labels, positions in _load(split, batch_size, generator, device):
        images = images.to(device, non_blocking=True)
        seen = augment(images, parameters[positions]) if parameters is not None else images
        yield to_input(seen), labels.to(device, non_blocking=True)


def eval_batches(split: Split, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) as in `train_batches`, every image once, in order, without augmentation."""
    for images, labels, _ in _load(split, batch_size, None, device):
        yield to_input(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
