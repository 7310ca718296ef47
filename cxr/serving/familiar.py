"""What tells whether an image is like the training images: part of a packaged model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cxr.evaluation.familiarity import Familiarity
from cxr.network.start import StartNetwork

_START = "start."


@dataclass(frozen=True, slots=True)
class Familiar:
    """The network that gives the features, and the distances between them."""

    start: StartNetwork
    distances: Familiarity

    def save(self, file: Path) -> None:
        """Write everything that the trained network does not hold."""
        kept = {f"{_START}{name}": value.detach().cpu().contiguous() for name, value in self.start.state().items()}
        for name in ("means", "precision", "reference"):
            kept[name] = torch.from_numpy(getattr(self.distances, name))
        save_file(kept, file)

    @classmethod
    def read(cls, file: Path, network: nn.Module) -> Familiar:
        """What `save` wrote; `network` is the trained one, or the first of an ensemble."""
        kept = load_file(file)
        own = {name.removeprefix(_START): value for name, value in kept.items() if name.startswith(_START)}
        distances = Familiarity(*(kept[name].numpy() for name in ("means", "precision", "reference")))
        return cls(StartNetwork(network, own), distances)
