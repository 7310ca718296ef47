"""A torchvision ResNet with two classes: its stages, its weights, obeying a phase, and the proof of freezing."""

from __future__ import annotations

import hashlib
import pickle
import socket
import warnings
from collections.abc import Iterable
from copy import deepcopy
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models import ResNet

from cxr.errors import UserError
from cxr.strategies import STAGES, Phase

StateDict = dict[str, Tensor]
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
IMAGENET_CLASSES = 1000
# No network, or it broke off; a hash that does not match; a file in torch's cache that is damaged.
_NO_DOWNLOAD = (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError)


def build_model(arch: str, weights: str, seed: int) -> tuple[ResNet, str]:
    """(model with a fresh two-class head, which weights were really used).

    `weights` is `auto`, `imagenet`, `random` or a file. The second value is `imagenet`, `random`, `random (...why)`
    or the file's name with the first digits of its sha256. Raises `UserError` when the weights cannot be had
    or do not fit.
    """
    torch.manual_seed(seed)
    model: ResNet = models.get_model(arch, weights=None, num_classes=2)
    if weights == "random":
        return model, "random"
    if weights in ("auto", "imagenet"):
        return model, _load_imagenet(model, arch, required=weights == "imagenet")
    path = Path(weights).expanduser().absolute()
    fit_weights(model, read_weights(path), str(path))
    return model, f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"


def _load_imagenet(model: ResNet, arch: str, required: bool) -> str:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none, and would wait for ever
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
        warnings.warn(f"ImageNet weights cannot be had ({error}); starting from RANDOM weights", stacklevel=3)
        return "random (ImageNet weights could not be downloaded)"
    finally:
        socket.setdefaulttimeout(before)
    fit_weights(model, state, "torchvision's ImageNet weights")
    return f"imagenet ({models.get_model_weights(arch)['DEFAULT']})"


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


def fit_weights(model: ResNet, state: StateDict, source: str) -> None:
    """Load `state` into the model, less a 1000-class head; any float type becomes float32.

    Raises `UserError` that lists the keys that are missing, unknown, of another shape or not finite.
    """
    own = model.state_dict()
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if "fc.bias" in state and state["fc.bias"].shape == (IMAGENET_CLASSES,):
        state = {**state, "fc.weight": own["fc.weight"], "fc.bias": own["fc.bias"]}
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


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")


def stage_modules(model: ResNet, stage: str) -> tuple[nn.Module, ...]:
    """The modules with parameters or buffers that make a stage."""
    if stage == "stem":
        return model.conv1, model.bn1
    module: nn.Module = getattr(model, stage)
    return (module,)


def run_stages(model: ResNet, x: Tensor, stages: Iterable[str]) -> Tensor:
    """Part of the network: `x` is what the stage before the first of `stages` gave (or the input)."""
    for stage in stages:
        if stage == "stem":
            x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        elif stage == "fc":
            x = model.fc(torch.flatten(model.avgpool(x), 1))
        else:
            x = getattr(model, stage)(x)
    return x


def folded(model: ResNet, stages: Iterable[str]) -> ResNet:
    """A copy for inference, each BatchNorm of the stages folded into the convolution before it.

    The same function up to rounding, in fewer passes over memory (`torch.nn.utils.fusion`).
    """
    copy = deepcopy(model).eval().requires_grad_(False)
    for stage in stages:
        for module in [copy] if stage == "stem" else getattr(copy, stage).modules():
            _fold(module)
    return copy


def _fold(module: nn.Module) -> None:
    """Among the module's own children; in torchvision's ResNets a BatchNorm follows its convolution."""
    for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context for `fp32` (none), `bf16` or `fp16`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def obey(model: ResNet, phase: Phase) -> list[nn.Parameter]:
    """Freeze the prefix (no gradients, eval mode, so that BatchNorm's buffers stay) and ready the suffix.

    Returns the parameters to optimise.
    """
    model.eval()
    model.requires_grad_(False)
    for stage in phase.trainable:
        for module in stage_modules(model, stage):
            module.train().requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stage_state(model: ResNet, stages: Iterable[str]) -> StateDict:
    """The state dict's entries, buffers included, that belong to the stages."""
    prefixes = tuple(p for s in stages for p in (("conv1.", "bn1.") if s == "stem" else (f"{s}.",)))
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}


def checksum(model: ResNet, stages: Iterable[str] = STAGES) -> str:
    """The sha256 of names and bytes of every parameter and buffer of the stages."""
    sha = hashlib.sha256()
    for key, value in stage_state(model, stages).items():
        sha.update(key.encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def bit_sums(model: ResNet, stages: Iterable[str]) -> list[int]:
    """The sum of the bits, read as integers, of each tensor of the stages: what any step changes, in milliseconds.

    For a proof, `checksum`.
    """
    values = stage_state(model, stages).values()
    sums = [(v.view(torch.int32) if v.dtype == torch.float32 else v).sum(dtype=torch.int64) for v in values]
    found: list[int] = torch.stack(sums).tolist() if sums else []
    return found


def count_parameters(model: ResNet, stages: Iterable[str] = STAGES) -> int:
    """How many numbers the stages learn."""
    return sum(p.numel() for s in stages for m in stage_modules(model, s) for p in m.parameters())
