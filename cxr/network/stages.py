"""The stages of a torchvision network: what belongs to each, and how a part of the network is run.

What one stage gives the next is always [n, c, h, w]. Networks that keep channels last inside (Swin) give a view of
that shape, and the tokens of a vision transformer are [n, c, tokens, 1], the class token first. So whatever is done
with such outputs (keeping them, Grad-CAM, pooling) need not know the family.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ConvNeXt, DenseNet, EfficientNet, ResNet, SwinTransformer, VisionTransformer

from cxr.families import CONVNEXT, DENSENET, EFFICIENTNET, RESNET, SWIN, VIT, Family

_FAMILY_OF: tuple[tuple[type[nn.Module], Family], ...] = (
    (ResNet, RESNET),
    (DenseNet, DENSENET),
    (EfficientNet, EFFICIENTNET),
    (ConvNeXt, CONVNEXT),
    (VisionTransformer, VIT),
    (SwinTransformer, SWIN),
)


def family_of(model: nn.Module) -> Family:
    """The family of a network. Raises `TypeError` if it is of none."""
    for kind, family in _FAMILY_OF:
        if isinstance(model, kind):
            return family
    raise TypeError(f"{type(model).__name__}: not a network of a known family")


def stages_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the stages, in order; the last is the head."""
    return family_of(model).stages


def classifier_of(model: nn.Module) -> nn.Linear:
    """The linear layer that gives the logits; it takes the pooled features."""
    layer = model.get_submodule(family_of(model).classifier)
    assert isinstance(layer, nn.Linear)
    return layer


def stage_paths(model: nn.Module, stage: str) -> list[str]:
    """The paths of the modules and parameters that make a stage, in the order in which they run."""
    paths: list[str] = []
    for path in family_of(model).parts[stage]:
        parent, _, first = path.removesuffix(":").rpartition(".")
        if path.endswith(":"):
            paths += [f"{parent}.{n}" for n in range(int(first), len(list(model.get_submodule(parent).children())))]
        else:
            paths.append(path)
    return paths


def stage_parts(model: nn.Module, stage: str) -> list[nn.Module | nn.Parameter]:
    """The modules, and parameters that are in none of them, that make a stage."""
    return [_part(model, path) for path in stage_paths(model, stage)]


def _part(model: nn.Module, path: str) -> nn.Module | nn.Parameter:
    parent, _, name = path.rpartition(".")
    part = getattr(model.get_submodule(parent), name)
    assert isinstance(part, nn.Module | nn.Parameter)
    return part


def stage_modules(model: nn.Module, stage: str) -> list[nn.Module]:
    """The modules that make a stage."""
    return [part for part in stage_parts(model, stage) if isinstance(part, nn.Module)]


def stage_parameters(model: nn.Module, stage: str) -> list[nn.Parameter]:
    """All parameters of a stage."""
    parts = stage_parts(model, stage)
    return [p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])]


def run_stages(model: nn.Module, x: Tensor, stages: Iterable[str]) -> Tensor:
    """Part of the network: `x` is what the stage before the first of `stages` gave (or the input)."""
    family = family_of(model)
    for stage in stages:
        if stage == family.stages[-1]:
            x = _head(model, pool(model, x))
        elif family is VIT:
            x = _from_tokens(_run_tokens(model, stage, x))
        elif family is SWIN:
            x = _in_order(model, stage, x if stage == "stem" else x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = _in_order(model, stage, x)
    return x


def _in_order(model: nn.Module, stage: str, x: Tensor) -> Tensor:
    for module in stage_modules(model, stage):
        x = module(x)
    return x


def _run_tokens(model: nn.Module, stage: str, x: Tensor) -> Tensor:
    """A stage of a vision transformer but the head: its input -> tokens [n, tokens, c]."""
    if stage != "stem":
        return _in_order(model, stage, x.squeeze(-1).transpose(1, 2))
    assert isinstance(model, VisionTransformer)
    patches = model.conv_proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.class_token.expand(len(x), -1, -1), patches], 1)
    dropped: Tensor = model.encoder.dropout(tokens + model.encoder.pos_embedding)
    return dropped


def _from_tokens(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unsqueeze(-1)


def pool(model: nn.Module, x: Tensor) -> Tensor:
    """What the head's linear layer looks at: what the last stage before it gave -> [n, c, 1, 1].

    It leaves what is pooled already as it is.
    """
    if isinstance(model, VisionTransformer):
        return x[:, :, :1]
    if isinstance(model, DenseNet):
        return F.adaptive_avg_pool2d(F.relu(x), 1)
    pooled: Tensor = model.get_submodule("avgpool")(x)
    return pooled


def _head(model: nn.Module, pooled: Tensor) -> Tensor:
    """Pooled features [n, c, 1, 1] -> logits. The head of ConvNeXt flattens them itself, after a norm."""
    x = pooled if isinstance(model, ConvNeXt) else torch.flatten(pooled, 1)
    for module in stage_modules(model, stages_of(model)[-1]):
        x = module(x)
    return x


def split_maps(model: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """What a stage gave -> (maps [n, c, h, w], what has no place in the image); `join_maps` is the inverse.

    For a vision transformer the maps are the patches' tokens on their square grid, and the rest is the class token;
    otherwise the rest is empty.
    """
    if family_of(model) is not VIT:
        return features, features[:, :, :0]
    tokens, side = features[:, :, 1:], round((features.shape[2] - 1) ** 0.5)
    return tokens.reshape(*features.shape[:2], side, side), features[:, :, :1]


def join_maps(model: nn.Module, maps: Tensor, rest: Tensor) -> Tensor:
    """The inverse of `split_maps`."""
    return torch.cat([rest, maps.flatten(2).unsqueeze(-1)], 2) if family_of(model) is VIT else maps
