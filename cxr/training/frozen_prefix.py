"""What a phase's frozen stages give for each (image, view): looked up where it is kept, else computed.

The stages are in eval mode and do not change while the phase runs, so each BatchNorm is folded into the convolution
before it, and the output for a view is computed once at most. It is kept in files that other runs share, or in the
device's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cxr.data.batches import Split, straight_order, to_device, view_batches
from cxr.data.views import PLAIN, Batch, View
from cxr.families import RESNET
from cxr.network.freezing import bit_sums, checksum
from cxr.network.inference import autocast, folded
from cxr.network.stages import family_of, pool, run_stages
from cxr.strategies import Phase
from cxr.training.row_file import RowFile, row_file_name

Progress = Callable[[Iterable[Batch], int], Iterable[Batch]]
Inputs = Callable[[Split, list[Tensor], View], Iterable[Batch]]


FIXED_BATCH = 8  # as fast as 32 on a CPU, and less to fill up


def silent(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
    """Show no progress."""
    return batches


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How images pass through a prefix: images per batch, the seed of their views, precision and device.

    `folder` is that of the files which other runs share; None keeps in memory. `progress(batches, total)` may show a
    bar. With `fold` false, the stages run as they are, and give the same bits as the whole network does.
    """

    batch_size: int
    seed: int
    precision: str
    device: torch.device
    folder: Path | None = None
    progress: Progress = silent
    fold: bool = True


class Prefix:
    """The frozen stages of a phase, and what they gave.

    `base`, if there is one, is the prefix of a later phase, which is a part of this one: what it has kept is the input.
    """

    def __init__(self, model: nn.Module, phase: Phase, settings: PassSettings, base: Prefix | None = None):
        self.phase, self.settings, self.base = phase, settings, base
        self.stages = phase.frozen[len(base.phase.frozen) if base else 0 :]
        self.checksum, self._bits = checksum(model, phase.frozen), bit_sums(model, phase.frozen)
        self.network = folded(model, self.stages) if settings.fold else model
        self.values: dict[tuple[int, View], Tensor] = {}  # of a split, in memory
        self._files: dict[View, RowFile] = {}
        self._row = torch.empty(0)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model's frozen stages are still as they were."""
        return self._bits == bit_sums(model, self.phase.frozen)

    def row(self, split: Split) -> Tensor:
        """What the stages give for one image of the split [1, c, h, w]."""
        if not self._row.numel():
            first = straight_order(split, 1)[:1]
            self._row = self._run(self.base.row(split) if self.base else next(self._inputs(split, first, PLAIN))[0])
        return self._row

    def compute(self, split: Split, order: list[Tensor], view: View, inputs: Inputs | None = None) -> Iterator[Batch]:
        """(what the stages give, labels), in the given order; `inputs` gives the network's, made anew if it is None."""
        if self.base:
            given: Iterable[Batch] = look_up(*self.base.kept(split, view), split, order)
        else:
            given = (inputs or self._inputs)(split, order, view)
        for features, labels in given:
            yield self._run(features), labels

    def _run(self, features: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.settings.device, self.settings.precision):
            if self.settings.device.type != "cpu":
                return self._pass(features)
            if family_of(self.network) is RESNET:
                return self._pass(_two_at_least(features))[: len(features)]
            return torch.cat([self._pass(part) for part in _filled(features)])[: len(features)]

    def _pass(self, features: Tensor) -> Tensor:
        features = run_stages(self.network, features, self.stages)
        # The head begins with this pooling, which leaves pooled features unchanged.
        return pool(self.network, features) if self.phase.head_only else features

    def _inputs(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        return view_batches(split, order, self.settings.seed, view, self.settings.device)

    def look_up(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        """As `compute`, from what is kept; computes here and now what is missing."""
        return look_up(*self.kept(split, view), split, order)

    def kept(self, split: Split, view: View) -> tuple[Tensor, Tensor]:
        """(what the stages give for a view, the row in it of each image of the split); what is missing is computed."""
        if self.settings.folder:
            return self._on_disk(self.settings.folder, split, view)
        at = (id(split.dataset), view)
        if at not in self.values:
            order = straight_order(split, self.settings.batch_size)
            computed = self.settings.progress(self.compute(split, order, view), len(order))
            self.values[at] = _collect(computed, len(split))
        return self.values[at], torch.arange(len(split))

    def _on_disk(self, folder: Path, split: Split, view: View) -> tuple[Tensor, Tensor]:
        rows = split.dataset.rows
        if view not in self._files:
            path, images, row = self.path(folder, split, view), len(split.dataset.images), self.row(split)
            self._files[view] = RowFile(path, images, tuple(row.shape[1:]), row.dtype)
        file = self._files[view]
        missing = np.flatnonzero(np.isin(rows, file.missing(rows)))
        if len(missing):
            order = list(torch.split(torch.from_numpy(missing), self.settings.batch_size))
            computed = self.settings.progress(self.compute(split, order, view), len(order))
            for chosen, (features, _) in zip(order, computed, strict=True):
                file.write(rows[chosen.numpy()], features)
        return file.values, torch.from_numpy(rows)

    def path(self, folder: Path, split: Split, view: View) -> Path:
        """Where the outputs for a view are kept: named by all that they depend on."""
        threads = torch.get_num_threads()  # they may decide in which order a kernel sums
        about: tuple[object, ...] = (self.checksum, self.phase.name, self.settings.precision, threads, split.store)
        about += () if self.settings.fold else ("not folded",)
        return folder / row_file_name(*about, *view.key(self.settings.seed))

    def begun(self, split: Split) -> bool:
        """Whether another run has begun to keep the outputs on disk."""
        return self.settings.folder is not None and self.path(self.settings.folder, split, PLAIN).exists()


def _two_at_least(features: Tensor) -> Tensor:
    """A single image twice: below 224 pixels, the CPU has other kernels for a batch of one, which sum in another order.

    So a row that is damaged, and computed again alone, gets the same bits.
    """
    if len(features) > 1:
        return features
    return features.expand(2, *features.shape[1:]).contiguous(memory_format=torch.channels_last)


def _filled(features: Tensor) -> Iterator[Tensor]:
    """In batches of one size, the last filled up with its first image.

    Outside ResNets, the CPU has kernels whose order of summing depends on the size of the batch; what is kept must not.
    """
    for part in torch.split(features, FIXED_BATCH):
        missing = part[:1].expand(FIXED_BATCH - len(part), *part.shape[1:])
        yield torch.cat([part, missing]).contiguous(memory_format=torch.channels_last)


def look_up(features: Tensor, rows: Tensor, split: Split, order: list[Tensor]) -> Iterator[Batch]:
    """(features, labels) in the given order; `rows` [n] says where each image's features [rows, c, h, w] are."""
    device = features.device
    labels, rows = torch.from_numpy(split.labels).to(device), rows.to(device)
    for index in to_device(order, device):
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
