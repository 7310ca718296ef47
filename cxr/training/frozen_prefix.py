"""What a phase's frozen stages give for each (image, view): looked up where it is kept, else computed.

The stages are in eval mode and do not change while the phase runs, so each BatchNorm is folded into the convolution
before it, and the output for a view is computed once at most. It is kept in files that other runs share (`shelf`), or
in the device's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet

from cxr.data.batches import Split, brought, straight_order, view_batches
from cxr.network.freezing import checksum
from cxr.network.inference import autocast, folded
from cxr.network.resnet import run_stages
from cxr.strategies import Phase
from cxr.training.row_file import RowFile, shelf_key

Batch = tuple[Tensor, Tensor]
Wrap = Callable[[Iterable[Batch], int], Iterable[Batch]]
PLAIN = -1  # in place of a view's number: as it is, without augmentation
View = int | str  # a view's number, or the name of a stress
Show = Callable[[Split, list[Tensor], View], Iterator[Batch]]  # gives (inputs, labels)


@dataclass(frozen=True, slots=True)
class Manner:
    """How images are shown: images at a time, the seed of their views, arithmetic, device, and the folder of shared
    files (None: what is kept is kept in memory).

    `wrap(batches, total)` may show progress; `shown` gives inputs that are asked for again and again.
    """

    batch_size: int
    seed: int
    precision: str
    device: torch.device
    shelf: Path | None
    wrap: Wrap
    shown: Show


class Prefix:
    """The frozen stages of a phase, and what they gave.

    `base`, if there is one, is the prefix of a later phase, which is a part of this one: what it keeps is gone on from.
    Set `kept` to keep what is computed.
    """

    def __init__(self, model: ResNet, phase: Phase, manner: Manner, base: Prefix | None = None):
        self.phase, self.manner, self.base, self.kept = phase, manner, base, False
        self.stages = phase.frozen[len(base.phase.frozen) if base else 0 :]
        self.checksum = checksum(model, phase.frozen)
        self.network = folded(model, self.stages)
        self.values: dict[tuple[int, View], Tensor] = {}  # of a split, in memory
        self._files: dict[View, RowFile] = {}
        self._row = torch.empty(0)

    def row(self, split: Split) -> Tensor:
        """What it gives for one image [1, c, h, w]."""
        if not self._row.numel():
            self._row, _ = next(iter(self.through(split, straight_order(split, 1)[:1], PLAIN)))
        return self._row

    def batches(self, split: Split, order: list[Tensor], view: View) -> Iterable[Batch]:
        """(what the stages give, labels), in the given order."""
        if not self.kept:
            return self._run(split, order, view, self.manner.shown)
        return look_up(*self.features(split, view), split, order)

    def through(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        """As `batches`, computed."""
        return self._run(split, order, view, self._made)

    def _run(self, split: Split, order: list[Tensor], view: View, shown: Show) -> Iterator[Batch]:
        device = self.manner.device
        if self.base:
            inputs_and_labels = look_up(*self.base.features(split, view), split, order)
        else:
            inputs_and_labels = shown(split, order, view)
        for inputs, labels in inputs_and_labels:
            # No `yield` inside: the contexts would hold for whoever takes the batch.
            with torch.no_grad(), autocast(device, self.manner.precision):
                features = run_stages(self.network, inputs, self.stages)
                if self.phase.first == "fc":  # it begins with this pooling, which leaves what is pooled as it is
                    features = self.network.avgpool(features)
            yield features, labels

    def _made(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        return view_batches(split, order, self.manner.seed, None if view == PLAIN else view, self.manner.device)

    def features(self, split: Split, view: View) -> tuple[Tensor, Tensor]:
        """(what the stages give for a view, the row in it of each image of the split); what is missing is computed."""
        if self.manner.shelf:
            return self._from_shelf(self.manner.shelf, split, view)
        at = (id(split.dataset), view)
        if at not in self.values:
            order = straight_order(split, self.manner.batch_size)
            self.values[at] = _collect(self.manner.wrap(self.through(split, order, view), len(order)), len(split))
        return self.values[at], torch.arange(len(split))

    def _from_shelf(self, shelf: Path, split: Split, view: View) -> tuple[Tensor, Tensor]:
        rows, row = split.dataset.rows, self.row(split)
        if view not in self._files:
            folder, images = self.folder(shelf, split, view), len(split.dataset.images)
            self._files[view] = RowFile(folder, images, tuple(row.shape[1:]), row.dtype)
        file = self._files[view]
        missing = np.flatnonzero(np.isin(rows, file.missing(rows)))
        if len(missing):
            order = list(torch.split(torch.from_numpy(missing), self.manner.batch_size))
            through = self.manner.wrap(self.through(split, order, view), len(order))
            for chosen, (features, _) in zip(order, through, strict=True):
                file.write(rows[chosen.numpy()], features)
        return file.values, torch.from_numpy(rows)

    def folder(self, shelf: Path, split: Split, view: View) -> Path:
        """Named by all that the rows depend on; the seed and the view matter only where images are augmented."""
        seen = (self.manner.seed, view) if isinstance(view, int) and view != PLAIN else (view,)
        threads = torch.get_num_threads()  # they may decide in which order a kernel sums
        return shelf / shelf_key(self.checksum, self.phase.name, self.manner.precision, threads, split.store, *seen)


def look_up(features: Tensor, rows: Tensor, split: Split, order: list[Tensor]) -> Iterator[Batch]:
    """(features, labels) in the given order; `rows` [n] says where each image's features [rows, c, h, w] are."""
    device = features.device
    labels, rows = torch.from_numpy(split.labels).to(device), rows.to(device)
    for index in brought(order, device):
        yield features[rows[index]].contiguous(memory_format=torch.channels_last), labels[index]


def _collect(batches: Iterable[Batch], images: int) -> Tensor:
    """The features of all images, filled into one tensor: joining them at the end would take twice the memory."""
    kept, at = torch.empty(0), 0
    for features, _ in batches:
        if at == 0:
            shape_of_all = features[:1].expand(images, -1, -1, -1)
            kept = torch.empty_like(shape_of_all, memory_format=torch.channels_last)
        kept[at : at + len(features)] = features
        at += len(features)
    return kept
