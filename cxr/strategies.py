"""Fine-tuning strategies as pure data: a strategy is a tuple of phases, and one training loop handles them all."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")  # of ResNets; `families.py` has those of the others


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of training with one set of trainable stages, one optimizer and one learning rate.

    `name` is the role: `head`, `top` or `all`. `first` is the first trainable stage of the network's `stages`: it and
    all later ones are trained, all earlier ones are frozen and stay in eval mode. `lr` is the name of the configuration
    field with the learning rate.
    """

    name: str
    first: str
    lr: str
    stages: tuple[str, ...] = STAGES

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen stages, in order."""
        return self.stages[: self.stages.index(self.first)]

    @property
    def trainable(self) -> tuple[str, ...]:
        """The trainable stages, in order."""
        return self.stages[self.stages.index(self.first) :]

    @property
    def head_only(self) -> bool:
        """Whether nothing but the head is trained."""
        return self.first == self.stages[-1]


# As they are in ResNets; `Family.phase` gives those of another family.
HEAD = Phase("head", first="fc", lr="lr_head")
TOP = Phase("top", first="layer4", lr="lr_top")
ALL = Phase("all", first="stem", lr="lr_all")
STRATEGIES: dict[str, tuple[Phase, ...]] = {
    "frozen": (HEAD,),
    "partial": (TOP,),
    "full": (ALL,),
    "gradual": (HEAD, TOP, ALL),
}
