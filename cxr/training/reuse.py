"""What a run keeps of its frozen prefixes' outputs, decided before it trains: a pure function of costs and limits.

Keeping pays where an output is needed again and costs more to compute than to write. No decision changes a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cxr.strategies import Phase

DISK = 5e8  # bytes a second that a disk is taken to write


class Decision(StrEnum):
    """What becomes of the outputs of a phase's frozen prefix."""

    KEPT_ON_DISK = "kept on disk"
    KEPT_IN_MEMORY = "kept in memory"
    TOO_LARGE = "computed in each epoch: too large for --reuse-gb"
    CHEAPER_AGAIN = "computed in each epoch: cheaper than keeping them"
    NOTHING_FROZEN = "nothing is frozen"


@dataclass(frozen=True, slots=True)
class Workload:
    """How many outputs a run needs.

    `train` and `val` are images, `views` the different views of a training image (0: none is augmented), `stressed`
    the stressed copies of validation images, `epochs` the maximum per phase (None: keeping is assumed to pay), `runs`
    the runs that share what is kept, `image_bytes` the size of a decoded image.
    """

    train: int
    val: int
    image_bytes: int
    views: int = 0
    stressed: int = 0
    epochs: int | None = None
    runs: int = 1

    def outputs(self) -> int:
        """The number of different (image, view)."""
        return self.train * max(self.views, 1) + self.val + self.stressed

    def repeats_views(self) -> bool:
        """Whether a training view is shown more than once."""
        return self.epochs is None or self.epochs > max(self.views, 1)

    def saved_outputs(self) -> int:
        """How many outputs need not be computed again if all are kept.

        In E epochs of K views, n training and m validation images, R runs compute R * E * (n + m) outputs, and with
        reuse min(E, K) * n + m.
        """
        epochs = self.epochs or 0
        once = min(epochs, max(self.views, 1)) * self.train + self.val
        return self.runs * epochs * (self.train + self.val) - once


@dataclass(frozen=True, slots=True)
class PrefixCost:
    """One output of a phase's prefix: its bytes, the seconds to compute it from the image, and whether another run has
    begun to write the outputs to the cache."""

    bytes: int
    seconds: float
    begun: bool = False


@dataclass(frozen=True, slots=True)
class PhaseReuse:
    """The decision for one phase: `bytes` are those of all its outputs; `base` names the later phase from whose kept
    outputs they are computed, if there is one."""

    phase: str
    decision: Decision
    bytes: float = 0.0
    base: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the outputs are kept."""
        return self.decision in (Decision.KEPT_ON_DISK, Decision.KEPT_IN_MEMORY)


@dataclass(frozen=True, slots=True)
class ReusePlan:
    """The decisions for all phases, in order. `keeps_views`: views that no kept output replaces are kept in memory."""

    phases: tuple[PhaseReuse, ...]
    keeps_views: bool

    def of(self, phase: Phase) -> PhaseReuse:
        """The decision for a phase."""
        return next(each for each in self.phases if each.phase == phase.name)


def plan_reuse(
    phases: tuple[Phase, ...], costs: Mapping[str, PrefixCost], work: Workload, budget: float, on_disk: bool
) -> ReusePlan:
    """Decide for each phase of a run whether the outputs of its frozen prefix are kept.

    `costs` holds those of each phase that freezes anything, by name; `budget` is in bytes, of the disk if `on_disk`,
    else of memory. A phase whose prefix contains that of a later phase computes its outputs from the later one's.
    """
    decided: dict[str, PhaseReuse] = {}
    for index in reversed(range(len(phases))):
        phase = phases[index]
        base = next((each for each in phases[index + 1 :] if 0 < len(each.frozen) < len(phase.frozen)), None)
        kept_base = decided[base.name] if base and decided[base.name].kept else None
        decided[phase.name] = _decide(phase, costs.get(phase.name), kept_base, (work, budget, on_disk))
    keeps_views = work.repeats_views() and work.outputs() * work.image_bytes <= budget
    return ReusePlan(tuple(decided[phase.name] for phase in phases), keeps_views)


def _decide(
    phase: Phase, cost: PrefixCost | None, base: PhaseReuse | None, limits: tuple[Workload, float, bool]
) -> PhaseReuse:
    if cost is None:
        return PhaseReuse(phase.name, Decision.NOTHING_FROZEN)
    work, budget, on_disk = limits
    need = float(cost.bytes * work.outputs())
    decision = Decision.KEPT_ON_DISK if on_disk else Decision.KEPT_IN_MEMORY
    if need + (base.bytes if base else 0) > budget:
        decision = Decision.TOO_LARGE
    elif on_disk and not _pays(cost, work, need):
        decision = Decision.CHEAPER_AGAIN
    return PhaseReuse(phase.name, decision, need, base.phase if base else None)


def _pays(cost: PrefixCost, work: Workload, need: float) -> bool:
    """Whether computing again what is needed again takes longer than writing it."""
    return work.epochs is None or cost.begun or work.saved_outputs() * cost.seconds > need / DISK
