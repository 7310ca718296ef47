"""Fine-tuning strategies as pure data: a strategy is a tuple of phases, and one training loop handles them all."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of training with one set of trainable stages, one optimizer and one learning rate.

    `first` is the first trainable stage: it and all later stages are trained, all earlier ones are frozen
    and stay in eval mode. `lr` is the name of the configuration field with the learning rate.
    """

    name: str
    first: str
    lr: str

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen stages, in order."""
        return STAGES[: STAGES.index(self.first)]

    @property
    def trainable(self) -> tuple[str, ...]:
        """The trainable stages, in order."""
        return STAGES[STAGES.index(self.first) :]


HEAD = Phase("head", first="fc", lr="lr_head")
TOP = Phase("top", first="layer4", lr="lr_top")
ALL = Phase("all", first="stem", lr="lr_all")
STRATEGIES: dict[str, tuple[Phase, ...]] = {
    "frozen": (HEAD,),
    "partial": (TOP,),
    "full": (ALL,),
    "gradual": (HEAD, TOP, ALL),
}
