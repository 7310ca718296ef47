"""Batches for the training loop: what enters a phase's first trainable stage, computed as seldom as possible.

What is kept is decided when a run begins (`reuse.plan_reuse`) and carried out when a phase begins (`enter`). A view is
computed when an epoch first asks for it, which costs what not keeping it would cost; iterating over batches of a kept
view only looks up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cxr.config import TrainConfig
from cxr.data.batches import (
    Split,
    epoch_order,
    eval_batches,
    grey_batches,
    make_split,
    straight_order,
    stressed_parts,
    to_device,
    view_batches,
)
from cxr.data.load import Data
from cxr.data.views import PLAIN, Batch, View, to_input
from cxr.machine import eval_batch_size
from cxr.network.stages import classifier_of, family_of
from cxr.storage import Cache
from cxr.strategies import HEAD, Phase
from cxr.training import distributed as parallel
from cxr.training.frozen_prefix import PassSettings, Prefix, Progress, silent
from cxr.training.reuse import PrefixCost, ReusePlan, Workload, plan_reuse


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What a `BatchSource` is to give, and may keep.

    `views` are the different views of a training image (0: no augmentation), drawn by the recipe `augment`; `budget` is
    the space for what is kept, bytes; `cache` holds the files that other runs share, None keeps in memory; `stresses`
    is the set for the stressed validation, None if it will not be asked for. `epochs` and `runs` are those of
    `reuse.Workload`; `phases` all phases of the run; `fold` as in `PassSettings`.
    """

    batch_size: int
    seed: int
    views: int
    precision: str
    budget: float
    phases: tuple[Phase, ...]
    cache: Cache | None = None
    augment: str = "mild-1"
    stresses: str | None = None
    epochs: int | None = None
    runs: int = 1
    progress: Progress = silent
    fold: bool = True


class BatchSource:
    """Batches (what the frozen prefix gives, labels) for `loop.fit`, on the model's device; `plan` is what it keeps."""

    def __init__(self, model: nn.Module, train: Split, val: Split, settings: SourceSettings):
        device = next(model.parameters()).device
        self.model, self.train_split, self.val_split, self.settings = model, train, val, settings
        folder = settings.cache.activations if settings.cache and device.type == "cpu" and train.store else None
        size = eval_batch_size(device, settings.batch_size)
        about = (size, settings.seed, settings.precision, device, folder, settings.progress, settings.fold)
        self.passes = PassSettings(*about)
        self.prefixes: dict[str, Prefix] = {}
        self._views: dict[tuple[int, View], Tensor] = {}
        self._phase: Phase | None = None
        chosen = settings.stresses
        self.stressed_parts = stressed_parts(val, len(train), chosen) if chosen else {}
        self.plan = self._plan()

    def _plan(self) -> ReusePlan:
        settings, train, val = self.settings, self.train_split, self.val_split
        stressed = sum(len(part) for part in self.stressed_parts.values())
        image_bytes = int(train.dataset.images[0].size)
        work = Workload(len(train), len(val), image_bytes, settings.views, stressed, settings.epochs, settings.runs)
        costs = {phase.name: self._cost(phase, work) for phase in settings.phases if phase.frozen}
        return plan_reuse(settings.phases, costs, work, settings.budget, self.passes.folder is not None)

    def _cost(self, phase: Phase, work: Workload) -> PrefixCost:
        """Of one output; timed only where the decision depends on it. The prefix is kept for the phase."""
        prefix = self.prefixes[phase.name] = Prefix(self.model, phase, self.passes)
        row = prefix.row(self.val_split)
        size, begun = row.numel() * row.element_size(), prefix.begun(self.val_split)
        if work.epochs is None or begun or not self.passes.folder:
            return PrefixCost(size, 0.0, begun)
        few = straight_order(self.val_split, 8)[:1]
        started = time.perf_counter()
        for _ in prefix.compute(self.val_split, few, PLAIN):
            pass
        return PrefixCost(size, (time.perf_counter() - started) / len(few[0]))

    def enter(self, phase: Phase) -> None:
        """Carry out the plan for a phase that begins: free what no phase needs any more, make room on disk.

        The phase's frozen stages must have their final values. Must be called before batches of the phase are taken.
        """
        if self._phase == phase:
            return
        self._phase = phase
        later = self.settings.phases[self.settings.phases.index(phase) + 1 :]
        wanted = {phase.name, *(each.name for each in later)}
        self.prefixes = {name: prefix for name, prefix in self.prefixes.items() if name in wanted}
        if phase.frozen:
            self._make_room(self._prefix(phase))

    def _prefix(self, phase: Phase) -> Prefix:
        """The prefix of a phase, with that of the later phase from whose outputs it starts, if the plan names one."""
        known, base = self.prefixes.get(phase.name), self.plan.of(phase).base
        start = next((self._prefix(each) for each in self.settings.phases if each.name == base), None)
        if known and known.base is start and known.is_of(self.model):
            return known
        self.prefixes[phase.name] = Prefix(self.model, phase, self.passes, start)
        return self.prefixes[phase.name]

    def _make_room(self, prefix: Prefix) -> None:
        """On disk, for what will be kept of this phase and of the one that it starts from."""
        kept = [each for each in (prefix, prefix.base) if each and self.plan.of(each.phase).kept]
        if self.settings.cache and self.passes.folder and kept:
            views = (PLAIN, *map(self._view, range(self.settings.views)), *self.stressed_parts)
            paths = {each.path(self.passes.folder, self.train_split, view) for each in kept for view in views}
            need = sum(self.plan.of(each.phase).bytes for each in kept)
            self.settings.cache.make_room(need, self.settings.budget, paths)

    def train(self, phase: Phase, epoch: int) -> Iterable[Batch]:
        """One epoch in its own order; epoch e shows view e mod `views`."""
        views = self.settings.views
        view = self._view(epoch % views) if views else PLAIN
        order = epoch_order(len(self.train_split), self.settings.batch_size, self.settings.seed, epoch)
        order = parallel.shares(order)
        return self.settings.progress(self._batches(phase, self.train_split, order, view), len(order))

    def _view(self, number: int) -> View:
        return View(number, recipe=self.settings.augment)

    def val(self, phase: Phase) -> Iterable[Batch]:
        """The validation split in order, without augmentation."""
        return self._in_order(phase, self.val_split, PLAIN)

    def stressed(self, phase: Phase) -> Iterable[Batch]:
        """The validation images under the stresses, one stress after the other (`stressed_parts`)."""
        return chain.from_iterable([self._in_order(phase, part, view) for view, part in self.stressed_parts.items()])

    def _in_order(self, phase: Phase, split: Split, view: View) -> Iterable[Batch]:
        return self._batches(phase, split, straight_order(split, self.passes.batch_size), view)

    def _batches(self, phase: Phase, split: Split, order: list[Tensor], view: View) -> Iterable[Batch]:
        if not phase.frozen:
            return self._inputs(split, order, view)
        prefix = self.prefixes[phase.name]
        if self.plan.of(phase).kept:
            return prefix.look_up(split, order, view)
        return prefix.compute(split, order, view, self._inputs)

    def _inputs(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        if self.plan.keeps_views:
            return self._from_kept_views(split, order, view)
        return view_batches(split, order, self.passes.seed, view, self.passes.device)

    def _from_kept_views(self, split: Split, order: list[Tensor], view: View) -> Iterator[Batch]:
        """What enters a network's first stage: each view is made once, and kept as grey levels of a byte each."""
        device, at = self.passes.device, (id(split.dataset), view)
        if at not in self._views:
            whole = straight_order(split, self.passes.batch_size)
            made = self.settings.progress(grey_batches(split, whole, self.passes.seed, view, device), len(whole))
            self._views[at] = torch.cat([images.byte() for images, _ in made])
        images, labels = self._views[at], torch.from_numpy(split.labels).to(device)
        return ((to_input(images[index]), labels[index]) for index in to_device(order, device))


def evaluation_batches(
    config: TrainConfig, data: Data, model: nn.Module, shared: tuple[str, ...], name: str
) -> tuple[Iterable[Batch], bool]:
    """(batches of a split in order, whether they hold what the stages `shared` give instead of images).

    They do where a phase of the run had exactly these stages frozen. They are then in fp32, of a ResNet bit for bit as
    the whole network would give them, and kept for other runs like all outputs of frozen stages.
    """
    part, device = make_split(data.manifest, data.store, name), next(model.parameters()).device
    phase = next((phase for phase in config.phases if phase.frozen == shared), None)
    if phase is None or not shared or device.type != "cpu":
        return eval_batches(part, config.batch_size, device), False
    return _plain_outputs(config, model, part, phase, "fp32", fold=False), True


def _plain_outputs(
    config: TrainConfig, model: nn.Module, part: Split, phase: Phase, precision: str, fold: bool
) -> Iterable[Batch]:
    """What a phase's frozen stages give for the images of a split in order, without augmentation."""
    cache, budget = Cache.open(config.cache_dir), config.reuse_gb * 1e9
    settings = SourceSettings(config.batch_size, 0, 0, precision, budget, (phase,), cache, fold=fold)
    source = BatchSource(model, part, part, settings)
    source.enter(phase)
    return source.val(phase)


Features = npt.NDArray[np.float32]


def pooled_features(
    config: TrainConfig, data: Data, model: nn.Module, precision: str, splits: tuple[str, ...] = ()
) -> Features:
    """What the network gives its head [n, d], for every image of the manifest (of the splits, if named) in order,
    without augmentation."""
    manifest = data.manifest[data.manifest["split"].isin(splits)] if splits else data.manifest
    found: Features = np.empty((len(manifest), classifier_of(model).in_features), np.float32)
    model.eval()
    head = family_of(model).phase(HEAD)
    for name in manifest["split"].unique():
        part = make_split(data.manifest, data.store, name)
        with torch.no_grad():
            outputs = _plain_outputs(config, model, part, head, precision, fold=True)
            places = iter(np.flatnonzero(manifest["split"] == name))
            for features, _ in outputs:
                found[list(islice(places, len(features)))] = features.float().flatten(1).cpu().numpy()
    return found
