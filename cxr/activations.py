"""What enters a phase's first trainable stage, computed once for each (image, view) and reused.

The prefix is frozen and in eval mode, so its output for a view cannot change while the phase runs. A view is computed
when an epoch first shows it, which costs what not keeping it would cost; from then on it is only looked up: on the CPU
in a file that other runs share (`shelf`), on a GPU in its memory. Where the budget does not suffice, or keeping would
cost more than it saves (`Activations.pays`), nothing is kept and the prefix runs in every epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet

from cxr.data.augment import STRESSES
from cxr.data.dataset import Split, epoch_order, eval_batches, straight_order, view_batches
from cxr.model import autocast, checksum, run_stages
from cxr.shelf import RowFile, make_room, shelf_key
from cxr.strategies import Phase

Batch = tuple[Tensor, Tensor]
Wrap = Callable[[Iterable[Batch], int], Iterable[Batch]]
DISK = 5e8  # bytes a second
PLAIN = -1  # in place of a view's number: as it is, without augmentation
View = int | str  # a view's number, or the name of a stress


class Activations:
    """Batches for `train.fit`: (what the prefix gives, labels), on the model's device.

    `budget` is the memory (with a shelf: the disk space) to spend, in bytes; `shelf` the folder of shared files, or
    None to keep all in memory. `wrap(batches, total)` may show progress. `epochs` (of a phase, at most) and `runs`
    (that share the shelf) tell whether keeping pays; None takes it that it does.
    """

    def __init__(
        self,
        model: ResNet,
        train: Split,
        val: Split,
        batch_size: int,
        seed: int,
        views: int,
        precision: str,
        budget: float,
        wrap: Wrap = lambda batches, total: batches,
        shelf: Path | None = None,
        stressed: bool = False,
        epochs: int | None = None,
        runs: int = 1,
    ):
        self.model, self.train, self.val = model, train, val
        self.batch_size, self.seed, self.views = batch_size, seed, views
        self.precision, self.budget, self.wrap = precision, budget, wrap
        self.device = next(model.parameters()).device
        self.shelf = shelf if self.device.type == "cpu" and train.store else None
        self.epochs, self.runs = epochs, runs
        self.stressed = stressed  # whether `stressed_batches` will be asked for, and must fit, too
        self._phase = ""
        self._prefix = ""
        self._kept: dict[tuple[bool, View], Tensor] = {}
        self._files: dict[View, RowFile] = {}
        self._probe = torch.empty(0)
        self._fits = False

    def train_batches(self, phase: Phase, epoch: int) -> Iterable[Batch]:
        """One epoch in its own order; epoch e shows view e mod `views`."""
        self._enter(phase)
        view = epoch % self.views if self.views else PLAIN
        order = epoch_order(len(self.train), self.batch_size, self.seed, epoch)
        if not self._fits:
            return self.wrap(self._through_prefix(phase, self._shown(self.train, order, view)), len(order))
        features, rows = self._features(phase, self.train, view, self.wrap)
        return self.wrap(self._look_up(features, rows, self.train, order), len(order))

    def val_batches(self, phase: Phase) -> Iterable[Batch]:
        """The validation split in order, without augmentation."""
        self._enter(phase)
        return self._val_seen(phase, PLAIN)

    def stressed_batches(self, phase: Phase) -> Iterable[Batch]:
        """The validation split under each of `STRESSES`, one after the other."""
        self._enter(phase)
        for stress in STRESSES:
            yield from self._val_seen(phase, stress)

    def _val_seen(self, phase: Phase, view: View) -> Iterator[Batch]:
        order = straight_order(self.val, self.batch_size)
        if not self._fits:
            return self._through_prefix(phase, self._shown(self.val, order, view))
        features, rows = self._features(phase, self.val, view, lambda batches, total: batches)
        return self._look_up(features, rows, self.val, order)

    def _enter(self, phase: Phase) -> None:
        """Forget another phase's outputs, and see whether this one's fit into the budget."""
        if phase.name == self._phase:
            return
        self._phase, self._fits = phase.name, False
        self._kept.clear()
        self._files.clear()
        if phase.frozen:
            self._probe, _ = next(iter(self._through_prefix(phase, eval_batches(self.val, 1, self.device))))
            images = len(self.train) * max(self.views, 1) + len(self.val) * (1 + self.stressed * len(STRESSES))
            need = self._probe.numel() * self._probe.element_size() * images
            self._fits = need <= self.budget and self.pays(phase, need)
            if self.shelf and self._fits:
                self._prefix = checksum(self.model, phase.frozen)
                keep = {self._folder(view) for view in (PLAIN, *range(self.views), *STRESSES)}
                make_room(self.shelf, need, self.budget, keep)

    def pays(self, phase: Phase, need: float) -> bool:
        """Whether the prefix's time for what would be computed again exceeds the time to write `need` bytes.

        In E epochs of K views, n training and m validation images, R runs would compute R * E * (n + m) outputs, and
        with reuse min(E, K) * n + m. One output is timed here; the disk is taken to write half a GB/s.
        """
        if self.epochs is None or not self.shelf:
            return True
        train, val = len(self.train), len(self.val)
        saved = self.runs * self.epochs * (train + val) - min(self.epochs, max(self.views, 1)) * train - val
        started = time.perf_counter()
        for _ in self._through_prefix(phase, self._shown(self.val, straight_order(self.val, 8)[:1], PLAIN)):
            pass
        one = (time.perf_counter() - started) / min(8, val)
        return saved * one > need / DISK

    def _shown(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        return view_batches(split, order, self.seed, None if view == PLAIN else view, self.device)

    def _features(self, phase: Phase, split: Split, view: View, wrap: Wrap) -> tuple[Tensor, Tensor]:
        """(what the prefix gives for a view, the row in it of each image of the split); what is missing is computed."""
        if self.shelf:
            return self._from_shelf(phase, split, view, wrap)
        at = (split is self.train, view)
        if at not in self._kept:
            order = straight_order(split, self.batch_size)
            through = wrap(self._through_prefix(phase, self._shown(split, order, view)), len(order))
            self._kept[at] = _collect(through, len(split))
        return self._kept[at], torch.arange(len(split))

    def _from_shelf(self, phase: Phase, split: Split, view: View, wrap: Wrap) -> tuple[Tensor, Tensor]:
        images, rows = len(split.dataset.images), split.dataset.rows
        if view not in self._files:
            self._files[view] = RowFile(self._folder(view), images, tuple(self._probe.shape[1:]), self._probe.dtype)
        file = self._files[view]
        missing = np.flatnonzero(np.isin(rows, file.missing(rows)))
        if len(missing):
            order = list(torch.split(torch.from_numpy(missing), self.batch_size))
            through = wrap(self._through_prefix(phase, self._shown(split, order, view)), len(order))
            for chosen, (features, _) in zip(order, through, strict=True):
                file.write(rows[chosen.numpy()], features)
        return file.values, torch.from_numpy(rows)

    def _folder(self, view: View) -> Path:
        """Named by all that the rows depend on; the seed and the view matter only where images are augmented."""
        assert self.shelf is not None
        seen = (self.seed, view) if isinstance(view, int) and view != PLAIN else (view,)
        threads = torch.get_num_threads()  # they may decide in which order a kernel sums
        key = shelf_key(self._prefix, self._phase, self.precision, threads, self.train.store, *seen)
        return self.shelf / key

    def _through_prefix(self, phase: Phase, batches: Iterable[Batch]) -> Iterator[Batch]:
        for inputs, labels in batches:
            # No `yield` inside: the contexts would hold for whoever takes the batch.
            with torch.no_grad(), autocast(self.device, self.precision):
                features = run_stages(self.model, inputs, phase.frozen)
                if phase.first == "fc":  # it begins with this pooling, which leaves what is pooled as it is
                    features = self.model.avgpool(features)
            yield features, labels

    def _look_up(self, features: Tensor, rows: Tensor, split: Split, order: list[Tensor]) -> Iterator[Batch]:
        labels, rows = torch.from_numpy(split.labels).to(self.device), rows.to(self.device)
        for chosen in order:
            index = chosen.to(self.device)
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
