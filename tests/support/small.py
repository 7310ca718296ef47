"""Configurations of runs that take seconds, and a `say` that discards its lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from narrow import ARCH

if TYPE_CHECKING:
    from cxr.config import CommandConfig, TrainConfig

Config = TypeVar("Config", bound="TrainConfig | CommandConfig")
SMALL = {"arch": ARCH, "weights": "random", "image_size": 64, "epochs": 1, "views": 1, "bootstrap": 0}


def small(kind: type[Config], folder: Path, **options: Any) -> Config:
    """A configuration of that kind on the images of `folder`: the narrow network, 64 pixels, one epoch."""
    from cxr.config import TrainConfig, configure

    parameters = {"data_dir": str(folder), **SMALL, **options}
    return kind(**parameters) if issubclass(kind, TrainConfig) else configure(kind, parameters)


def quiet(line: str) -> None:
    """Discard the line."""
