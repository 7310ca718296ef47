"""The families of networks as pure data: their stages in order, and what each strategy trains of them.

A path names a module or a parameter of the torchvision network; one that ends in `:` names a child of a `Sequential`
and all later ones. `cxr/network/stages.py` runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cxr.strategies import STAGES, STRATEGIES, Phase


@dataclass(frozen=True, slots=True)
class Family:
    """Networks that consist of the same stages.

    `kind` is the name of their class in torchvision. `parts` maps each stage, in order, to the paths of what it runs;
    the last is the head, without the pooling in front of it. `classifier` is the path of the head's linear layer. The
    phase `top` trains `top` and all later stages: those at the network's lowest resolution. `cam` is the stage after
    which Grad-CAM is taken. The image size must be a multiple of `multiple`. `renamed` maps patterns of keys in
    published state dicts to today's names.
    """

    kind: str
    parts: Mapping[str, tuple[str, ...]]
    classifier: str
    top: str
    cam: str
    multiple: int = 1
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, in order."""
        return tuple(self.parts)

    def phase(self, phase: Phase) -> Phase:
        """The phase that has the same role (head, top, all) in a network of this family."""
        first = {"head": self.stages[-1], "top": self.top, "all": self.stages[0]}[phase.name]
        return replace(phase, first=first, stages=self.stages)

    def phases(self, strategy: str) -> tuple[Phase, ...]:
        """The phases of a strategy, in order."""
        return tuple(self.phase(phase) for phase in STRATEGIES[strategy])


def _resnet_parts() -> dict[str, tuple[str, ...]]:
    return {stage: (stage,) for stage in STAGES} | {"stem": ("conv1", "bn1", "relu", "maxpool")}


RESNET = Family("ResNet", _resnet_parts(), classifier="fc", top="layer4", cam="layer4")
DENSENET = Family(
    "DenseNet",
    {
        "stem": tuple(f"features.{name}" for name in ("conv0", "norm0", "relu0", "pool0")),
        **{f"block{n}": (f"features.denseblock{n}", f"features.transition{n}") for n in (1, 2, 3)},
        "block4": ("features.denseblock4", "features.norm5"),
        "classifier": ("classifier",),
    },
    classifier="classifier",
    top="block4",
    cam="block4",
    # As torchvision's own loader does (`torchvision.models.densenet`).
    renamed=((r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2"),),
)
EFFICIENTNET = Family(
    "EfficientNet",
    {
        "stem": ("features.0",),
        **{f"stage{n}": (f"features.{n}",) for n in range(1, 6)},
        "stage6": ("features.6:",),  # the lowest resolution, and the last convolution
        "classifier": ("classifier",),
    },
    classifier="classifier.1",
    top="stage6",
    cam="stage6",
)
CONVNEXT = Family(
    "ConvNeXt",
    {
        "stem": ("features.0",),
        "stage1": ("features.1",),
        **{f"stage{n}": (f"features.{2 * n - 2}", f"features.{2 * n - 1}") for n in (2, 3, 4)},
        "classifier": ("classifier",),
    },
    classifier="classifier.2",
    top="stage4",
    cam="stage4",
)
VIT = Family(
    "VisionTransformer",
    {
        "stem": ("conv_proj", "class_token", "encoder.pos_embedding", "encoder.dropout"),
        **{f"block{n}": (f"encoder.layers.encoder_layer_{n}",) for n in range(11)},
        "block11": ("encoder.layers.encoder_layer_11", "encoder.ln"),
        "heads": ("heads",),
    },
    classifier="heads.head",
    top="block9",  # a quarter of the blocks, as there are no resolutions
    cam="block10",  # after the last block only the class token reaches the head
    multiple=16,
    # As torchvision's own loader does (`torchvision.models.vision_transformer.MLPBlock`).
    renamed=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
)
SWIN = Family(
    "SwinTransformer",
    {
        "stem": ("features.0",),
        "stage1": ("features.1",),
        **{f"stage{n}": (f"features.{2 * n - 2}", f"features.{2 * n - 1}") for n in (2, 3)},
        "stage4": ("features.6", "features.7", "norm"),
        "head": ("head",),
    },
    classifier="head",
    top="stage4",
    cam="stage4",
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), RESNET),
    **dict.fromkeys(("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"), RESNET),
    **dict.fromkeys(("wide_resnet50_2", "wide_resnet101_2"), RESNET),
    **dict.fromkeys(("densenet121", "densenet169", "densenet201"), DENSENET),
    **dict.fromkeys((*(f"efficientnet_b{n}" for n in range(5)), "efficientnet_v2_s"), EFFICIENTNET),
    **dict.fromkeys(("convnext_tiny", "convnext_small", "convnext_base"), CONVNEXT),
    "vit_b_16": VIT,
    "swin_t": SWIN,
}
