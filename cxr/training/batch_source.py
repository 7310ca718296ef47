"""Batches for the training loop: what enters a phase's first trainable stage, computed as seldom as can be.

A view is computed when an epoch first shows it, which costs what not keeping it would cost; from then on it is only
looked up: on the CPU in a file that other runs share (`shelf`), on a GPU in its memory. Where the budget does not
suffice, or keeping would cost more than it saves (`Activations.pays`), nothing is kept and the prefix runs in every
epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.models import ResNet

from cxr.config import TrainConfig
from cxr.data.batches import Split, brought, epoch_order, grey_batches, make_split, straight_order, view_batches
from cxr.data.load import Data
from cxr.data.views import STRESSES, to_input
from cxr.machine import eval_batch_size
from cxr.network.freezing import checksum
from cxr.storage import cache_folder, make_room
from cxr.strategies import HEAD, Phase
from cxr.training import distributed as parallel
from cxr.training.frozen_prefix import PLAIN, Batch, Manner, Prefix, View, Wrap

DISK = 5e8  # bytes a second


class Activations:
    """Batches for `train.fit`: (what the prefix gives, labels), on the model's device.

    `budget` is the memory (with a shelf: the disk space) to spend, in bytes; `shelf` the folder of shared files, or
    None to keep all in memory. `wrap(batches, total)` may show progress. `epochs` (of a phase, at most) and `runs`
    (that share the shelf) tell whether keeping pays; None takes it that it does. `phases` are those of the run: a phase
    whose prefix holds that of a later one goes on from what is kept for that.
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
        phases: tuple[Phase, ...] = (),
    ):
        device = next(model.parameters()).device
        self.model, self.train, self.val, self.views = model, train, val, views
        self.batch_size, self.budget, self.phases = batch_size, budget, phases
        self.epochs, self.runs = epochs, runs
        self.stressed = stressed  # whether `stressed_batches` will be asked for, and must fit, too
        shelf = shelf if device.type == "cpu" and train.store else None
        self.manner = Manner(eval_batch_size(device, batch_size), seed, precision, device, shelf, wrap, self._inputs)
        self.prefixes: dict[str, Prefix] = {}
        again = epochs is None or epochs > max(views, 1)  # whether a view is shown twice
        self.keeps_views = again and self._shown() * train.dataset.images[0].size <= budget
        self._views: dict[tuple[int, View], Tensor] = {}
        self._phase = ""

    def train_batches(self, phase: Phase, epoch: int) -> Iterable[Batch]:
        """One epoch in its own order; epoch e shows view e mod `views`."""
        self._enter(phase)
        view = epoch % self.views if self.views else PLAIN
        order = parallel.shares(epoch_order(len(self.train), self.batch_size, self.manner.seed, epoch))
        return self.manner.wrap(self._batches(phase, self.train, order, view), len(order))

    def val_batches(self, phase: Phase) -> Iterable[Batch]:
        """The validation split in order, without augmentation."""
        self._enter(phase)
        return self._val_seen(phase, PLAIN)

    def stressed_batches(self, phase: Phase) -> Iterable[Batch]:
        """The validation split under each of `STRESSES`, one after the other."""
        self._enter(phase)
        for stress in STRESSES:
            yield from self._val_seen(phase, stress)

    def _val_seen(self, phase: Phase, view: View) -> Iterable[Batch]:
        return self._batches(phase, self.val, straight_order(self.val, self.manner.batch_size), view)

    def _batches(self, phase: Phase, split: Split, order: list[Tensor], view: View) -> Iterable[Batch]:
        if phase.frozen:
            return self.prefixes[phase.name].batches(split, order, view)
        return self._inputs(split, order, view)

    def _inputs(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        if self.keeps_views:
            return self._from_kept_views(split, order, view)
        return view_batches(split, order, self.manner.seed, None if view == PLAIN else view, self.manner.device)

    def _from_kept_views(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        """What enters a network's first stage: each view is made once, and kept as grey levels of a byte each."""
        device, at = self.manner.device, (id(split.dataset), view)
        if at not in self._views:
            seen = None if view == PLAIN else view
            whole = straight_order(split, self.manner.batch_size)
            made = self.manner.wrap(grey_batches(split, whole, self.manner.seed, seen, device), len(whole))
            self._views[at] = torch.cat([images.byte() for images, _ in made])
        images, labels = self._views[at], torch.from_numpy(split.labels).to(device)
        for index in brought(order, device):
            yield to_input(images[index]), labels[index]

    def _enter(self, phase: Phase) -> None:
        """Forget the outputs that this phase and later ones have no use for, and ready this one's."""
        if phase.name == self._phase:
            return
        self._phase = phase.name
        wanted = {phase.name, *(each.name for each in self._later(phase))}
        self.prefixes = {name: prefix for name, prefix in self.prefixes.items() if name in wanted}
        if phase.frozen:
            self._make_room(self._ready(phase))

    def _make_room(self, prefix: Prefix) -> None:
        """On the shelf, for what will be kept of this phase and of the one that it leaves something for."""
        kept = [each for each in (prefix, prefix.base) if each and each.kept]
        if self.manner.shelf and kept:
            views = (PLAIN, *range(self.views), *STRESSES)
            folders = {each.folder(self.manner.shelf, self.train, view) for each in kept for view in views}
            make_room(self.manner.shelf, sum(self._need(each) for each in kept), self.budget, folders)

    def _later(self, phase: Phase) -> tuple[Phase, ...]:
        return self.phases[self.phases.index(phase) + 1 :] if phase in self.phases else ()

    def _ready(self, phase: Phase) -> Prefix:
        """The phase's prefix, and whether what it gives is kept."""
        known = self.prefixes.get(phase.name)
        if known and known.checksum == checksum(self.model, phase.frozen):
            return known
        prefix = Prefix(self.model, phase, self.manner, self._base(phase))
        need, spent = self._need(prefix), self._need(prefix.base) if prefix.base else 0
        prefix.kept = need + spent <= self.budget and self.pays(prefix, need)
        self.prefixes[phase.name] = prefix
        return prefix

    def _base(self, phase: Phase) -> Prefix | None:
        """The prefix of the next later phase whose stages begin this one's, if what it gives is kept."""
        shorter = [each for each in self._later(phase) if 0 < len(each.frozen) < len(phase.frozen)]
        base = self._ready(shorter[0]) if shorter else None
        return base if base and base.kept else None

    def _need(self, prefix: Prefix) -> float:
        """Bytes, for all that will be shown."""
        row = prefix.row(self.val)
        return float(row.numel() * row.element_size() * self._shown())

    def _shown(self) -> int:
        """How many different (image, view) there are."""
        return len(self.train) * max(self.views, 1) + len(self.val) * (1 + self.stressed * len(STRESSES))

    def pays(self, prefix: Prefix, need: float) -> bool:
        """Whether the prefix's time for what would be computed again exceeds the time to write `need` bytes.

        In E epochs of K views, n training and m validation images, R runs would compute R * E * (n + m) outputs, and
        with reuse min(E, K) * n + m. One output is timed here; the disk is taken to write half a GB/s.
        """
        if self.epochs is None or not self.manner.shelf:
            return True
        if prefix.folder(self.manner.shelf, self.val, PLAIN).exists():  # another run has begun to write them
            return True
        train, val = len(self.train), len(self.val)
        saved = self.runs * self.epochs * (train + val) - min(self.epochs, max(self.views, 1)) * train - val
        return saved * self._seconds(prefix) > need / DISK

    def _seconds(self, prefix: Prefix) -> float:
        """What one output costs when it is computed from the image."""
        whole = Prefix(self.model, prefix.phase, self.manner) if prefix.base else prefix
        few = straight_order(self.val, 8)[:1]
        started = time.perf_counter()
        for _ in whole.through(self.val, few, PLAIN):
            pass
        return (time.perf_counter() - started) / len(few[0])


Features = npt.NDArray[np.float32]


def pooled_features(config: TrainConfig, data: Data, model: ResNet, precision: str) -> Features:
    """What the network gives its head [n, d], for every image of the manifest in order, without augmentation."""
    shelf = cache_folder(config.cache_dir) / "activations"
    found: Features = np.empty((len(data.manifest), model.fc.in_features), np.float32)
    model.eval()
    for name in data.manifest["split"].unique():
        part = make_split(data.manifest, data.store, name)
        budget = config.reuse_gb * 1e9
        source = Activations(model, part, part, config.batch_size, 0, 0, precision, budget, shelf=shelf)
        with torch.no_grad():
            rows = [features.float().flatten(1).cpu() for features, _ in source.val_batches(HEAD)]
        found[(data.manifest["split"] == name).to_numpy()] = torch.cat(rows).numpy()
    return found
