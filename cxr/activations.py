"""What enters a phase's first trainable stage, computed once for each (image, view) and reused.

The prefix is frozen and in eval mode, so its output for a view cannot change while the phase runs. A view is computed
when an epoch first shows it, which costs what not keeping it would cost; from then on it is only looked up. Where the
memory does not suffice, nothing is kept and the prefix runs in every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torchvision.models import ResNet

from cxr.data.dataset import Split, epoch_order, eval_batches, straight_order, view_batches
from cxr.model import autocast, run_stages
from cxr.strategies import Phase

Batch = tuple[Tensor, Tensor]
Wrap = Callable[[Iterable[Batch], int], Iterable[Batch]]


class Activations:
    """Batches for `train.fit`: (what the prefix gives, labels), on the model's device.

    `budget` is the memory to spend, in bytes. `wrap(batches, total)` may show progress.
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
    ):
        self.model, self.train, self.val = model, train, val
        self.batch_size, self.seed, self.views = batch_size, seed, views
        self.precision, self.budget, self.wrap = precision, budget, wrap
        self.device = next(model.parameters()).device
        self._phase = ""
        self._kept: dict[int, Tensor] = {}
        self._fits = False

    def train_batches(self, phase: Phase, epoch: int) -> Iterable[Batch]:
        """One epoch in its own order; epoch e shows view e mod `views`."""
        self._enter(phase)
        view = epoch % self.views if self.views else 0
        order = epoch_order(len(self.train), self.batch_size, self.seed, epoch)
        if not self._fits:
            shown = view_batches(self.train, order, self.seed, view if self.views else None, self.device)
            return self.wrap(self._through_prefix(phase, shown), len(order))
        if view not in self._kept:
            straight = straight_order(self.train, self.batch_size)
            shown = view_batches(self.train, straight, self.seed, view if self.views else None, self.device)
            self._kept[view] = _collect(self.wrap(self._through_prefix(phase, shown), len(straight)), len(self.train))
        return self.wrap(self._look_up(self._kept[view], order), len(order))

    def val_batches(self, phase: Phase) -> Iterable[Batch]:
        """The validation split in order, without augmentation."""
        self._enter(phase)
        if not self._fits:
            return self._through_prefix(phase, eval_batches(self.val, self.batch_size, self.device))
        if -1 not in self._kept:
            batches = eval_batches(self.val, self.batch_size, self.device)
            self._kept[-1] = _collect(self._through_prefix(phase, batches), len(self.val))
        labels = torch.from_numpy(self.val.labels).to(self.device)
        return zip(torch.split(self._kept[-1], self.batch_size), torch.split(labels, self.batch_size), strict=True)

    def _enter(self, phase: Phase) -> None:
        """Forget another phase's outputs, and see whether this one's fit into the budget."""
        if phase.name == self._phase:
            return
        self._phase, self._fits = phase.name, False
        self._kept.clear()
        if phase.frozen:
            probe, _ = next(iter(self._through_prefix(phase, eval_batches(self.val, 1, self.device))))
            images = len(self.train) * max(self.views, 1) + len(self.val)
            self._fits = probe.numel() * probe.element_size() * images <= self.budget

    def _through_prefix(self, phase: Phase, batches: Iterable[Batch]) -> Iterator[Batch]:
        for inputs, labels in batches:
            # No `yield` inside: the contexts would hold for whoever takes the batch.
            with torch.no_grad(), autocast(self.device, self.precision):
                features = run_stages(self.model, inputs, phase.frozen)
                if phase.first == "fc":  # it begins with this pooling, which leaves what is pooled as it is
                    features = self.model.avgpool(features)
            yield features, labels

    def _look_up(self, features: Tensor, order: list[Tensor]) -> Iterator[Batch]:
        labels = torch.from_numpy(self.train.labels).to(self.device)
        for chosen in order:
            index = chosen.to(self.device)
            yield features[index].contiguous(memory_format=torch.channels_last), labels[index]


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
