"""Pretrained weights: torchvision's download or a file, checked before they are loaded."""

from __future__ import annotations

import pickle
import re
import socket
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from cxr.errors import UserError
from cxr.families import VIT, Family
from cxr.network.stages import family_of

StateDict = dict[str, Tensor]


class WeightsKind(Enum):
    """Where the initial weights come from."""

    IMAGENET = auto()
    RANDOM = auto()
    NOT_DOWNLOADED = auto()  # random, because ImageNet's could not be downloaded
    FILE = auto()


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Which weights a run really started from; `detail` names torchvision's weights or the file."""

    kind: WeightsKind
    detail: str = ""

    @property
    def random(self) -> bool:
        """Whether nothing is pretrained."""
        return self.kind in (WeightsKind.RANDOM, WeightsKind.NOT_DOWNLOADED)

    def __str__(self) -> str:
        """The value of the tag `weights_used`."""
        return {
            WeightsKind.IMAGENET: f"imagenet ({self.detail})",
            WeightsKind.RANDOM: "random",
            WeightsKind.NOT_DOWNLOADED: "random (ImageNet weights could not be downloaded)",
            WeightsKind.FILE: self.detail,
        }[self.kind]


DOWNLOAD_TIMEOUT = 30  # seconds without an answer
IMAGENET_CLASSES = 1000

# No network, or it broke off; a hash that does not match; a file in torch's cache that is damaged.
_NO_DOWNLOAD = (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError)


def load_imagenet(model: nn.Module, arch: str, required: bool) -> InitialWeights:
    """Load torchvision's ImageNet weights; if the download fails and is not required, the model stays random."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none and would wait forever
    try:
        state = models.get_model_weights(arch)["DEFAULT"].get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except _NO_DOWNLOAD as error:
        if required:
            raise UserError(
                f"--weights imagenet: cannot be downloaded ({error}); name a file with --weights PATH, "
                "or use --weights random"
            ) from error
        warnings.warn(f"ImageNet weights could not be downloaded ({error}); starting from RANDOM weights", stacklevel=3)
        return InitialWeights(WeightsKind.NOT_DOWNLOADED)
    finally:
        socket.setdefaulttimeout(before)
    fit_weights(model, state, "torchvision's ImageNet weights")
    return InitialWeights(WeightsKind.IMAGENET, str(models.get_model_weights(arch)["DEFAULT"]))


def read_weights(path: Path) -> StateDict:
    """A state dict from `.safetensors`, or from `.pth`/`.pt` without running any code in it.

    Raises `UserError` when it is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file (nor one of: auto, imagenet, random)")
    try:
        state = _read_tensors(path)
    except pickle.UnpicklingError as error:
        raise UserError(f"--weights {path}: refused, it holds more than tensors, or is damaged") from error
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"--weights {path}: cannot be read ({reason}); is it whole?") from error
    if not _is_state_dict(state):
        raise UserError(f"--weights {path}: not a state dict (name -> tensor)")
    return cast(StateDict, state)


def _is_state_dict(state: object) -> bool:
    return (
        isinstance(state, dict)
        and len(state) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    )


def _read_tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state) if isinstance(state, dict) else state


def fit_weights(model: nn.Module, state: StateDict, source: str) -> None:
    """Load `state` into the model, less a 1000-class head; any float type becomes float32.

    The position embedding of a vision transformer for another image size is interpolated.

    Raises `UserError` that lists the keys that are missing, unknown, of another shape or not finite.
    """
    own, family = model.state_dict(), family_of(model)
    state = {_renamed(key, family): v.float() if v.is_floating_point() else v for key, v in state.items()}
    head = [f"{family.classifier}.{name}" for name in ("weight", "bias")]
    if head[1] in state and state[head[1]].shape == (IMAGENET_CLASSES,):
        state = {**state, **{key: own[key] for key in head}}
    state = _resized(state, own) if family is VIT else state
    wrong = {
        "missing": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "unknown": [k for k in state if k not in own],
        "of another shape": [k for k in state if k in own and state[k].shape != own[k].shape],
        "not finite": [k for k in state if not torch.isfinite(state[k]).all()],
    }
    if any(wrong.values()):
        parts = "; ".join(f"{what}: {_few(keys)}" for what, keys in wrong.items() if keys)
        raise UserError(f"--weights {source}: does not fit --arch: {parts}")
    model.load_state_dict(state, strict=False)


def _renamed(key: str, family: Family) -> str:
    for pattern, name in family.renamed:
        key = re.sub(pattern, name, key)
    return key


def _resized(state: StateDict, own: StateDict) -> StateDict:
    """The state with its position embedding [1, 1 + side^2, c] for the image size of `own`, as torchvision does it."""
    key = "encoder.pos_embedding"
    if key not in state or state[key].dim() != 3 or not _is_square(state[key].shape[1] - 1):
        return state  # `fit_weights` says what is wrong
    side = round((own[key].shape[1] - 1) ** 0.5)
    return {**state, **interpolate_embeddings(side, 1, OrderedDict({key: state[key]}))}


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
