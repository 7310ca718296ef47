"""Where a network looks: Grad-CAM heat maps, which images are worth explaining, and the pictures of both.

A heat map shows where in the image the last block found what speaks for a class. It shows neither that this is
pathology nor what would change the answer, and its resolution is that of layer4: one value for 32 x 32 pixels.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxr.data.decode import UInt8
from cxr.errors import UserError
from cxr.figures.single import HEAT, explanation_panel
from cxr.figures.style import Floats
from cxr.network.gradcam import POSITIVE, heatmaps
from cxr.serving.predictor import ModelCard, Predictor


def overlay(image: UInt8, heat: Floats) -> UInt8:
    """A grey image [s, s] under its heat [s, s] -> uint8 [s, s, 3], in the colours of `cxr.plots.HEAT`."""
    color = HEAT(heat)
    color, opacity = color[..., :3], color[..., 3:]
    mixed: UInt8 = np.rint((1 - opacity) * image[..., None] + opacity * 255 * color).astype(np.uint8)
    return mixed


def explain_files(predictor: Predictor, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write each image next to its heat map as `<stem>_gradcam.png` into `folder`; returns the files.

    The map is that of the positive class, or of the decided one of more than two.

    From the second on, images of one stem get a number: `<stem>_gradcam_2.png`. Raises `UserError` before anything is
    written for images that cannot be read, naming all of them, or would be overwritten; and for a folder that cannot
    be written.
    """
    images = np.stack(predictor.read_files(paths))
    table = predictor.predict(list(images)).assign(image=[path.name for path in paths])
    files = _targets(paths, folder)
    targets = POSITIVE if predictor.card.task.binary else list(table["decision"])
    figures = map(_pair, images, heatmaps(predictor.model, images, targets), _titles(table, predictor.card))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure, file in zip(figures, files, strict=True):
            _save(figure, file)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); name another folder") from error
    return files


def _targets(paths: Sequence[Path], folder: Path) -> list[Path]:
    seen: Counter[str] = Counter()
    files = []
    for path in paths:
        key = path.stem.casefold()  # some file systems do not tell `a` from `A`
        seen[key] += 1
        files.append(folder / f"{path.stem}_gradcam{f'_{seen[key]}' if seen[key] > 1 else ''}.png")
    if taken := set(map(os.path.realpath, files)) & set(map(os.path.realpath, paths)):
        names = ", ".join(sorted(taken))
        raise UserError(f"{folder}: would overwrite {names}, which is to be explained; name another folder")
    return files


def _titles(table: pd.DataFrame, card: ModelCard) -> list[str]:
    """File name, decision and probability of each row of a `Predictor`'s table."""
    names = [Path(image).name.replace("$", r"\$") for image in table["image"]]  # a bare $ would start mathematics
    rows = zip(names, table["label"], table["probability"], strict=True)
    if not card.task.binary:
        return [f"{name}: decision {label}, probability {p:.3f}" for name, label, p in rows]
    of = f"probability of {card.task.positive}"
    return [f"{name}: decision {label}, {of} {p:.3f} (threshold {card.threshold:.3g})" for name, label, p in rows]


def _pair(image: UInt8, heat: Floats, title: str) -> Figure:
    """An image without and with its heat."""
    return explanation_panel(np.stack([image] * 2), np.stack([0 * heat, heat]), ["X-ray", "Grad-CAM"], title)


def _save(figure: Figure, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name in letters that the font has not
        figure.savefig(file)
