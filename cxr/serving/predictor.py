"""Image bytes in, probability and decision out: what a registry version holds, without training or tracking code.

A packaged model is a folder with `weights.safetensors` (a torchvision state dict), `model.json` (everything else) and
the sha256 of both.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import importlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cxr.data import dicom
from cxr.data.decode import ImageError, UInt8, check_shape, decode_gray, square_gray
from cxr.data.depth import FULL
from cxr.data.views import IMAGENET_MEAN, IMAGENET_STD, Batch, to_input
from cxr.errors import UserError
from cxr.evaluation.calibration import IDENTITY, Calibration
from cxr.evaluation.familiarity import Float32
from cxr.evaluation.metrics import Floats
from cxr.evaluation.predictions import decided
from cxr.evaluation.selective import certainty_of
from cxr.families import FAMILIES
from cxr.network.ensemble import Ensemble
from cxr.network.inference import infer, infer_with_features
from cxr.network.resnet import create
from cxr.network.weights import StateDict
from cxr.serving.familiar import Familiar
from cxr.task import MAX_CLASSES, Task

WEIGHTS, FEATURES, CARD, ONNX = "weights.safetensors", "features.safetensors", "model.json", "X_ray_classifier.onnx"
DIGESTS = "digests.json"  # the sha256 of each of the package's other files


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What must be known to use the weights: architecture, preprocessing, classes, threshold and origin.

    With several `members`, the weights are those of an `Ensemble`. Predictions of which the certainty is below
    `certainty_limit` abstain. `depth` is that of 16-bit grey, in bits.
    """

    arch: str
    image_size: int
    resize: str
    threshold: float
    strategy: str
    data_fingerprint: str
    weights: str
    class_to_index: dict[str, int]
    calibration: Calibration = IDENTITY
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    members: int = 1
    certainty_limit: float = 0.0
    depth: int = FULL

    @property
    def task(self) -> Task:
        """The classes, in the order of their labels."""
        return Task(tuple(sorted(self.class_to_index, key=self.class_to_index.__getitem__)))

    def answers(self, selective: bool) -> dict[str, str]:
        """Column -> type of what the model answers, in order; `selective` if it tells familiarity."""
        others = () if self.task.binary else tuple(f"probability_{slug}" for slug in self.task.slugs)
        columns = {"label": "string", "probability": "double", "decision": "long", **dict.fromkeys(others, "double")}
        return columns | ({"familiarity": "double", "abstain": "boolean"} if selective else {})

    def text(self) -> str:
        """The card as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `text`, for cards of earlier versions, too. Raises TypeError, KeyError or ValueError for what
        is no card."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"{CARD}: not a JSON object")
        calibration = Calibration.from_card(fields.get("calibration", asdict(IDENTITY)))
        card = cls(**{**fields, "calibration": calibration})
        if wrong := [name for name, is_good in card._checked().items() if not is_good]:
            raise ValueError(f"{CARD}: {', '.join(wrong)} cannot be")
        return card

    def _checked(self) -> dict[str, bool]:
        """Of each field, whether its value is one that it can have."""
        known = isinstance(self.arch, str) and self.arch in FAMILIES
        multiple = FAMILIES[self.arch].multiple if known else 1
        classes = self.class_to_index if isinstance(self.class_to_index, dict) else {}
        refused = 0 if self.calibration.refused_slope is None else self.calibration.refused_slope
        labels = sorted(map(repr, classes.values()), key=lambda text: (len(text), text))
        return {
            "arch": known,
            "image_size": _is_whole(self.image_size, 32, 1024) and self.image_size % multiple == 0,
            "resize": self.resize in ("squash", "crop", "pad"),
            "threshold": _are_numbers([self.threshold]),
            **{name: isinstance(getattr(self, name), str) for name in ("strategy", "data_fingerprint", "weights")},
            "class_to_index": 2 <= len(classes) <= MAX_CLASSES and labels == [str(n) for n in range(len(classes))],
            "calibration": _are_numbers([self.calibration.slope, self.calibration.offset, refused]),
            **{name: _are_numbers(getattr(self, name), 3) for name in ("mean", "std")},
            "members": _is_whole(self.members, 1, 1000),
            "certainty_limit": _are_numbers([self.certainty_limit]),
            "depth": _is_whole(self.depth, 8, FULL),
        }


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _are_numbers(values: object, count: int = 0) -> bool:
    """Whether these are numbers, and so many, if that is given."""
    if not isinstance(values, list | tuple) or len(values) != (count or len(values)):
        return False
    return all(isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) for each in values)


def save_package(folder: Path, state: StateDict, card: ModelCard, familiar: Familiar | None = None) -> None:
    """Write the packaged model into `folder`, made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / WEIGHTS)
    if familiar:
        familiar.save(folder / FEATURES)
    (folder / CARD).write_text(card.text())
    digests = {name: _digest(folder / name) for name in (WEIGHTS, FEATURES, CARD) if (folder / name).exists()}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_digests(folder: Path) -> None:
    """Raise ValueError for a package that is not as it was written; those of earlier versions tell no digests."""
    if not (folder / DIGESTS).exists():
        return
    digests = json.loads((folder / DIGESTS).read_text())
    present = {name for name in (WEIGHTS, FEATURES, CARD) if (folder / name).exists()}
    if not isinstance(digests, dict) or digests.keys() != present:
        raise ValueError(f"{DIGESTS}: does not tell of the files that are there")
    for name, digest in digests.items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name}: not as it was written, by its sha256")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ImageError("text that is not base64; paths and addresses are not read") from error


def _from_array(values: npt.NDArray[Any] | list[Any]) -> Image.Image:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ImageError("a list whose rows differ in length") from error
    whole = np.issubdtype(array.dtype, np.integer) and array.size > 0
    if not whole or array.min() < 0 or array.max() > 255 or array.shape[2:] not in ((), (3,)) or array.ndim < 2:
        raise ImageError(f"array {array.dtype} {array.shape}: not uint8 [height, width] or [height, width, 3]")
    check_shape(array.shape[1], array.shape[0], "L")
    return Image.fromarray(array.astype(np.uint8))


class _Probability(nn.Module):
    """Grey levels [n, s, s] -> probabilities of the positive class [n], or of all [n, k] of more than two classes: what
    follows the decoding, as one graph."""

    def __init__(self, model: nn.Module, calibration: Calibration):
        super().__init__()
        self.model, self.calibration = model, calibration

    def forward(self, image: Tensor) -> Tensor:
        """As `Predictor.predict`."""
        logits = self.model(to_input(image))
        if logits.shape[1] > 2:
            return torch.softmax(self.calibration.slope * logits, 1)
        return torch.sigmoid(self.calibration.slope * (logits[:, 1] - logits[:, 0]) + self.calibration.offset)


def _to_onnx(network: nn.Module, example: Tensor) -> torch.onnx.ONNXProgram:
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("images", min=1)},),
            input_names=["image"],
            output_names=["probability"],
            verbose=False,
        )
    assert program is not None
    return program


class Predictor:
    """A packaged model in use."""

    def __init__(self, model: nn.Module, card: ModelCard, familiar: Familiar | None = None):
        self.model, self.card, self.familiar = model.eval(), card, familiar

    @property
    def networks(self) -> list[nn.Module]:
        """The plain torchvision modules: one, or the members of an ensemble."""
        return self.model.networks if isinstance(self.model, Ensemble) else [self.model]

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        """Read a packaged model; no pickle is involved.

        Raises one of several errors, of which `cxr.tracking.registry.read_package` makes a `UserError`, for a damaged
        one.
        """
        _check_digests(folder)
        card = ModelCard.parse((folder / CARD).read_text())
        state, count = load_file(folder / WEIGHTS), len(card.class_to_index)
        if card.members > 1 and len({name.split(".")[1] for name in state if "." in name}) != card.members:
            raise ValueError(f"{WEIGHTS}: not of {card.members} networks")
        networks = [create(card.arch, count, card.image_size) for _ in range(card.members)]
        model: nn.Module = networks[0] if card.members == 1 else Ensemble(networks)
        model.load_state_dict(state)
        model = model.to(memory_format=torch.channels_last)
        return cls(model, card, Familiar.read(folder / FEATURES, networks[0]))

    def prepare(self, image: object, named_dicom: bool = False) -> UInt8:
        """Encoded bytes, their base64 text, or a uint8 array [h, w] or [h, w, 3] -> uint8 [size, size].

        Bytes are a JPEG, a PNG or a DICOM file; one without a preamble only if `named_dicom`. Text is never taken for a
        path or an address. Raises `ImageError` for what is no usable image.
        """
        if isinstance(image, str):
            image = _from_base64(image)
        if isinstance(image, bytes | bytearray | memoryview):
            with dicom.quiet():
                card = self.card
                return decode_gray(bytes(image), card.image_size, card.resize, card.depth, named_dicom)[0]
        if isinstance(image, np.ndarray | list):
            return square_gray(_from_array(image), self.card.image_size, self.card.resize)
        raise ImageError(f"{type(image).__name__}: neither bytes, base64 text nor a uint8 array")

    def predict_files(self, paths: Sequence[Path]) -> pd.DataFrame:
        """Files -> columns image, label, probability, decision. Raises `UserError` naming all that are no images."""
        table = self.predict(self.read_files(paths))
        table.insert(0, "image", [os.fsencode(path).decode(errors="replace") for path in paths])
        return table

    def read_files(self, paths: Sequence[Path]) -> list[UInt8]:
        """Files -> prepared images. Raises `UserError` naming all that are no images."""
        prepared, bad = [], []
        for path in paths:
            try:
                prepared.append(self.prepare(path.read_bytes(), dicom.has_dicom_name(path)))
            except (OSError, ImageError) as error:
                bad.append(f"{path} ({getattr(error, 'strerror', None) or error})")
        if bad:
            raise UserError(f"{len(bad)} of {len(paths)} images cannot be read: {'; '.join(bad)}")
        return prepared

    def export(self, folder: Path, onnx: bool = False) -> list[Path]:
        """Write the plain torchvision state dict (that of each member of an ensemble), the class mapping, the card and,
        if asked, an ONNX model; returns the files.

        The ONNX model takes uint8 grey images [n, size, size] and gives their probabilities of the positive class [n],
        or of all [n, k] of more than two. Raises `UserError` when they cannot be written, the packages for ONNX are not
        installed, or PyTorch cannot export the network.
        """
        names = ["X_ray_classifier.pth"]
        if len(self.networks) > 1:
            names = [f"X_ray_classifier_{number}.pth" for number in range(len(self.networks))]
        files = [folder / name for name in (*names, "class_to_index.json", CARD)]
        graph = self._onnx() if onnx else None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for network, file in zip(self.networks, files, strict=False):
                torch.save(network.state_dict(), file)
            files[-2].write_text(json.dumps(self.card.class_to_index) + "\n")
            files[-1].write_text(self.card.text())
            if graph is not None:
                files.append(folder / ONNX)
                graph.save(files[-1])
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder}: cannot be written ({error}); name another folder") from error
        return files

    def _onnx(self) -> torch.onnx.ONNXProgram:
        """By PyTorch's own exporter, for any number of images."""
        try:
            importlib.import_module("onnxscript")
        except ImportError as error:
            hint = "`uv run --extra onnx cxr models export …` brings it"
            raise UserError(f"--onnx: the package {error.name} is not installed; {hint}") from error
        example = torch.zeros(2, self.card.image_size, self.card.image_size, dtype=torch.uint8)
        # A copy, because the exporter wants the usual memory layout.
        plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)
        network = _Probability(plain, self.card.calibration).eval()
        try:
            return _to_onnx(network, example)
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(f"--onnx: PyTorch cannot export {self.card.arch} ({reason}); leave --onnx out") from error

    def predict(self, images: Sequence[UInt8]) -> pd.DataFrame:
        """Prepared images -> columns label, probability, decision (the label's number), familiarity and abstain.

        Of two classes, the probability is that of the positive one, decided at or above the threshold. Of more, it is
        that of the label, the most probable class, and `probability_NAME` are those of all. Familiarity (the percentage
        of validation images at most as familiar) and abstain (whether the prediction is too uncertain) are absent from
        models of version 0.1.
        """
        stack = torch.from_numpy(np.stack(images))
        batches = ((to_input(part), torch.zeros(len(part), dtype=torch.int64)) for part in torch.split(stack, 32))
        logits, familiarity = self.outputs(batches)
        every = self.card.calibration.probabilities(logits)
        table = self._decided(every)
        if familiarity is None:
            return table
        abstains = certainty_of(every, self.card.threshold) < self.card.certainty_limit
        return table.assign(familiarity=familiarity, abstain=abstains)

    def _decided(self, every: Floats) -> pd.DataFrame:
        """The columns that follow from the probabilities [n, k]."""
        task = self.card.task
        probability = every[:, 1] if task.binary else every.max(1)
        decision = decided(every, self.card.threshold)
        label = [task.classes[int(index)] for index in decision]
        table = pd.DataFrame({"label": label, "probability": probability, "decision": decision})
        others = {} if task.binary else {f"probability_{slug}": every[:, c] for c, slug in enumerate(task.slugs)}
        return table.assign(**others)

    def outputs(self, batches: Iterable[Batch]) -> tuple[Float32, Floats | None]:
        """(logits [n, k], familiarity [n] in percent, or None if the model was made by version 0.1)."""
        if self.familiar is None:
            return infer(self.model, batches)[0].numpy(), None
        features, logits = infer_with_features(self.model, self.familiar.start, batches)
        return logits.numpy(), self.familiar.distances.percentiles(features.numpy())
