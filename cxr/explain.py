"""Where a network looks: Grad-CAM heat maps, which images are worth explaining, and the pictures of both.

A heat map shows where in the image the last block found what speaks for a class. It shows neither that this is
pathology nor what would change the answer, and its resolution is that of layer4: one value for 32 x 32 pixels.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam  # type: ignore[import-untyped,unused-ignore]
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.models import ResNet

from cxr.data.augment import to_input
from cxr.data.index import CLASS_TO_INDEX, CLASSES
from cxr.data.store import UInt8
from cxr.errors import UserError
from cxr.model import run_stages
from cxr.plots import HEAT, Floats, explanation_panel
from cxr.predictor import Predictor
from cxr.strategies import STAGES

RIGHT, WRONG, BORDERLINE = "confident right", "confident wrong", "borderline"
_BATCH = 32
_BEFORE, _AFTER = STAGES[:-2], STAGES[-2:]  # layer4, whose maps are wanted, and the head


def heatmaps(model: ResNet, images: UInt8 | Sequence[UInt8], target: int = CLASS_TO_INDEX["PNEUMONIA"]) -> Floats:
    """Prepared images [n, s, s] -> float32 [n, s, s] in 0 to 1: what spoke for class `target` where.

    Grad-CAM (Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks, 2017) of the class's logit on layer4,
    enlarged bilinearly, each map in parts of its own maximum; one without any support is 0 throughout. The model is
    evaluated in eval mode whatever its state, on its own device, and is left as it was.
    """
    # A copy: modes, flags and gradients of the caller's model stay whatever happens here, and captum hooks into this.
    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    parts = torch.split(torch.from_numpy(np.array(images)), _BATCH)
    heats: Floats = torch.cat([_heat(model, part.to(device), target).cpu() for part in parts]).numpy()
    return heats


def _heat(model: ResNet, images: Tensor, target: int) -> Tensor:
    with torch.no_grad():  # up to layer4 no gradient is asked for, and a graph would fill gigabytes
        features = run_stages(model, to_input(images), _BEFORE)
    cam = LayerGradCam(lambda x: run_stages(model, x, _AFTER), model.layer4)
    maps = cam.attribute(features.requires_grad_(), target=target, relu_attributions=True).detach()
    heat = F.interpolate(maps, size=images.shape[1:], mode="bilinear", align_corners=False).squeeze(1)
    highest = heat.amax((1, 2), keepdim=True)
    return torch.where(highest > 0, heat / highest, 0.0)


def overlay(image: UInt8, heat: Floats) -> UInt8:
    """A grey image [s, s] under its heat [s, s] -> uint8 [s, s, 3], in the colours of `cxr.plots.HEAT`."""
    color = HEAT(heat)
    color, opacity = color[..., :3], color[..., 3:]
    mixed: UInt8 = np.rint((1 - opacity) * image[..., None] + opacity * 255 * color).astype(np.uint8)
    return mixed


def choose_examples(table: pd.DataFrame, threshold: float, count: int = 4) -> pd.DataFrame:
    """Up to `count` rows of each `kind`: confident right, confident wrong, borderline; in this order, no image twice.

    `table` has the columns path, label (0, 1) and probability (of pneumonia), and an index without repeats; rows keep
    theirs. Of rows with the same digest, where there is that column, only the first path's is taken. Confidence is
    the probability of what was decided; half of the right ones are of either class, as far as there are any.
    Borderline are those nearest to the threshold among the rest. The order of the table's rows does not matter.
    """
    table = table.sort_values("path").drop_duplicates("digest" if "digest" in table else "path")
    called = table["probability"] >= threshold
    confidence = table["probability"].where(called, 1 - table["probability"])
    table = table.loc[confidence.sort_values(ascending=False, kind="stable").index]
    correct = called[table.index] == (table["label"] == 1)
    right = _of_both_classes(table[correct], count)
    wrong = list(table[~correct].index[:count])
    distance = (table["probability"] - threshold).abs().drop([*right, *wrong])
    nearest = list(distance.sort_values(kind="stable").index[:count])
    kinds = [RIGHT] * len(right) + [WRONG] * len(wrong) + [BORDERLINE] * len(nearest)
    return table.loc[[*right, *wrong, *nearest]].assign(kind=kinds)


def _of_both_classes(table: pd.DataFrame, count: int) -> list[Hashable]:
    """The index of `count` rows, the first of either class in equal parts, and filled up by whatever comes next."""
    halves = table.groupby("label").head(count // 2).index
    return [*halves, *table.index.drop(halves)][:count]


def examples_panel(model: ResNet, images: UInt8, chosen: pd.DataFrame, title: str) -> Figure:
    """One figure that explains the images [n, s, s] of the n rows that `choose_examples` chose, in their order."""
    rows = zip(chosen["kind"], chosen["label"], chosen["probability"], strict=True)
    captions = [f"{kind}: {_unbroken(f'{CLASSES[label]}, p = {p:.3f}')}" for kind, label, p in rows]
    heading = f"{title}; true class and probability p of pneumonia"
    return explanation_panel(images, heatmaps(model, images), captions, heading)


def _unbroken(text: str) -> str:
    """Text that captions are not broken within."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def explain_files(predictor: Predictor, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write each image beside its heat map of pneumonia as `<stem>_gradcam.png` into `folder`; returns the files.

    From the second on, images of one stem get a number: `<stem>_gradcam_2.png`. Raises `UserError` before anything is
    written for images that cannot be read, naming all of them, or would be overwritten; and for a folder that cannot
    be written.
    """
    images = np.stack(predictor.read_files(paths))
    table = predictor.predict(list(images)).assign(image=[path.name for path in paths])
    files = _targets(paths, folder)
    figures = map(_pair, images, heatmaps(predictor.model, images), _titles(table, predictor.card.threshold))
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


def _titles(table: pd.DataFrame, threshold: float) -> list[str]:
    """File name, decision and probability of each row of a `Predictor`'s table."""
    names = [Path(image).name.replace("$", r"\$") for image in table["image"]]  # a bare $ would start mathematics
    rows = zip(names, table["label"], table["probability"], strict=True)
    limit = f"threshold {threshold:.3g}"
    return [f"{name}: decision {label}, probability of pneumonia {p:.3f} ({limit})" for name, label, p in rows]


def _pair(image: UInt8, heat: Floats, title: str) -> Figure:
    """An image without and with its heat."""
    return explanation_panel(np.stack([image] * 2), np.stack([0 * heat, heat]), ["X-ray", "Grad-CAM"], title)


def _save(figure: Figure, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a name in letters that the font has not
        figure.savefig(file)
