"""What the page of `cxr demo` shows of a model and of one film, as values for JSON. Films are read from memory."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import expit, logit

from cxr.data import dicom
from cxr.data.decode import UInt8, decode_gray
from cxr.evaluation.report import UNFAMILIAR
from cxr.figures.single import HEAT
from cxr.figures.style import Floats
from cxr.network.gradcam import POSITIVE, heatmaps
from cxr.serving.choice import Choice
from cxr.serving.predictor import ModelCard, Predictor

SHOWN = 768  # pixels of the side of a shown film, if the model does not see more


def about(choice: Choice, predictor: Predictor) -> dict[str, Any]:
    """Which model it is, and what its answers mean: classes in order, threshold, the probabilities between which it
    abstains, the familiarity below which a film is unlike those of training, and the columns of a table of answers."""
    card = predictor.card
    return {
        "uri": choice.uri,
        "name": choice.name,
        "phantoms": choice.phantoms,
        "notes": choice.notes | _notes(card),
        "classes": list(card.task.classes),
        "binary": card.task.binary,
        "threshold": card.threshold,
        "undecided": _undecided(card),
        "unfamiliar": UNFAMILIAR,
        "columns": list(card.answers(predictor.familiar is not None)),
    }


def _notes(card: ModelCard) -> dict[str, str]:
    members = f", ensemble of {card.members}" if card.members > 1 else ""
    return {
        "network": card.arch + members,
        "strategy": card.strategy,
        "start weights": card.weights,
        "calibration": card.calibration.words(),
        "input": f"{card.image_size} x {card.image_size} pixels, {card.resize}",
        "data fingerprint": card.data_fingerprint,
    }


def _undecided(card: ModelCard) -> tuple[float, float] | None:
    """The probabilities of the positive class between which a model of two classes abstains; None if it never does."""
    if not card.task.binary or card.certainty_limit <= 0:
        return None
    at = logit(card.threshold)
    return float(expit(at - card.certainty_limit)), float(expit(at + card.certainty_limit))


def answer(predictor: Predictor, data: bytes, named_dicom: bool) -> dict[str, Any]:
    """What the model says of an encoded film: a row of `Predictor.predict`, and `probabilities` of all classes.

    Raises `ImageError` for what is no usable image.
    """
    task = predictor.card.task
    (row,) = predictor.predict([predictor.prepare(data, named_dicom)]).to_dict("records")
    positive = row["probability"]
    every = [1 - positive, positive] if task.binary else [row[f"probability_{slug}"] for slug in task.slugs]
    return {"row": row, "probabilities": every}


def picture(predictor: Predictor, data: bytes, named_dicom: bool) -> dict[str, Any]:
    """A film as the model sees it, in more pixels, and the heat map over it, as PNG in data URLs.

    The map is Grad-CAM of the positive class, or of the decided one of more than two (`heatmaps`); `class` names it.
    `aspect` is the width over the height at which to show both. Raises `ImageError` for what is no usable image.
    """
    card, seen = predictor.card, predictor.prepare(data, named_dicom)
    task, target = card.task, POSITIVE
    if not task.binary:
        target = int(predictor.predict([seen])["decision"][0])
    (heat,) = heatmaps(predictor.model, seen[None], target)
    with dicom.quiet():
        side = max(SHOWN, card.image_size)
        film, (width, height, _) = decode_gray(data, side, card.resize, card.depth, named_dicom)
    return {
        "film": _png(film),
        "heat": _png(_colored(heat)),
        "class": task.classes[target],
        "aspect": width / height if card.resize == "squash" else 1.0,
    }


def _colored(heat: Floats) -> UInt8:
    """A heat map [s, s] -> RGBA [s, s, 4], transparent where there is none."""
    color: UInt8 = np.asarray(HEAT(heat, bytes=True), np.uint8).copy()
    color[..., 3] = np.rint(255 * heat)
    return color


def _png(image: UInt8) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
