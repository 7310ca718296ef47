"""Figures of runs that nobody looks at. To draw and save fifteen of them takes longer than the rest of such a run."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from matplotlib.figure import Figure
from PIL import Image

from cxr.tracking import tracker

save_figure = tracker.MlflowTracker.figure


class _Plots:
    """In place of `cxr.figures.single`: every figure is empty."""

    def __getattr__(self, name: str) -> Callable[..., Figure]:
        return empty


def empty(*arguments: object, **options: object) -> Figure:
    """Any figure."""
    return Figure()


def leave_plots_out(patch: pytest.MonkeyPatch, *, studies_too: bool = True) -> None:
    """Runs log a pixel under the name of each of their plots, and so do studies, unless it is these that are tested."""

    def save(self: tracker.MlflowTracker, figure: Figure, path: str) -> None:
        if not (studies_too or path.startswith("plots/")):
            return save_figure(self, figure, path)
        with self._artifact(path) as file:
            Image.new("L", (1, 1)).save(file)
        return None

    patch.setattr(tracker.MlflowTracker, "figure", save)
    if record := sys.modules.get("cxr.runs.record"):  # where it was never imported, no run will be made
        patch.setattr(record, "plots", _Plots())
        patch.setattr(record, "calibration_pair", empty)
        patch.setattr(record, "_gradcam_panel", empty)
