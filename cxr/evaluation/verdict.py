"""The decision of a comparison of strategies, by stated rules; `verdict_text` puts it into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import pandas as pd
from scipy import stats

from cxr.evaluation.paired import LEVEL, PRIMARY, Floats, Subject
from cxr.strategies import STRATEGIES

CLAIMED = "partial"  # the strategy that the claim is about
MIN_SEEDS = 3  # of each strategy, to decide the claim


class PairOutcome(Enum):
    """How a strategy compares with the one that has the highest mean."""

    WORSE = auto()
    NOT_DISTINGUISHABLE = auto()


class ClaimOutcome(Enum):
    """What the runs say about the claim."""

    SUPPORTED = auto()
    NOT_SUPPORTED = auto()
    NOT_DECIDED = auto()
    NOT_TESTED = auto()


class Reason(Enum):
    """Why the claim has its outcome. "Others" are the strategies that `Claim.others` names."""

    ONE_STRATEGY = auto()  # nothing to compare
    CLAIMED_NOT_RUN = auto()
    FEW_SEEDS = auto()
    WORSE = auto()  # than the others
    NOT_SHOWN_NON_INFERIOR = auto()  # to the others
    OTHERS_VARY_LESS = auto()  # and perform as well
    SPREADS_NOT_DISTINGUISHABLE = auto()  # from those of the others, which perform as well
    OTHERS_NOT_RUN = auto()  # it holds among the strategies that were run
    VARIES_LEAST = auto()


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference in `PRIMARY`, its 95% interval, and its p value after Holm's correction."""

    value: float
    low: float
    high: float
    p_holm: float

    @property
    def distinguishable(self) -> bool:
        """Whether Holm's p is at most `LEVEL`."""
        return self.p_holm <= LEVEL

    def non_inferior(self, margin: float) -> bool:
        """Whether the lower end lies above minus `margin`."""
        return self.low > -margin


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """A strategy against the best one: `difference` is this one minus the best."""

    strategy: str
    outcome: PairOutcome
    non_inferior: bool
    difference: Difference


@dataclass(frozen=True, slots=True)
class Claim:
    """What became of the claim, why, and the other strategies that the reason is about."""

    outcome: ClaimOutcome
    reason: Reason
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The strategy with the highest mean of `PRIMARY`, with its 95% interval; every other against it; and the claim.

    `seeds` holds the number of seeds of each strategy. Where backbones are compared, they take the place of strategies,
    and there is no claim.
    """

    best: str
    mean: float
    low: float
    high: float
    seeds: dict[str, int]
    margin: float
    pairs: tuple[PairVerdict, ...]
    claim: Claim | None


def decide(table: pd.DataFrame, pairs: pd.DataFrame, margin: float, subject: Subject = Subject.STRATEGY) -> Verdict:
    """The verdict from `strategy_table` and `paired_table`, for a non-inferiority `margin` in units of `PRIMARY`.

    Two strategies are *not distinguishable* when Holm's p of their difference is above 0.05. One is *non-inferior* to
    another when the lower end of its difference lies above minus `margin`; *worse*, for the claim, is distinguishable
    and not shown to be non-inferior. The claim is tested with three seeds or more of each strategy. It fails when
    `partial` is worse than another. It holds when `partial` is non-inferior to every other of the four, and varies less
    over the seeds than each other of which the same is true (F test of the two variances, two-sided 0.05); it fails
    when one of those varies less. In all other cases it is not decided. Raises `KeyError` for a pair that is not in
    `pairs`.
    """
    best = str(table[PRIMARY].idxmax())
    row = table.loc[best].to_dict()
    mean, low, high = (float(row[name]) for name in (PRIMARY, f"{PRIMARY}_low", f"{PRIMARY}_high"))
    seeds = {str(name): int(count) for name, count in table["seeds"].items()}
    against_best = tuple(_against(best, other, pairs, margin) for other in seeds if other != best)
    claim = _claim(table, pairs, margin) if subject is Subject.STRATEGY else None
    return Verdict(best, mean, low, high, seeds, margin, against_best, claim)


def _against(best: str, other: str, pairs: pd.DataFrame, margin: float) -> PairVerdict:
    difference = _difference(other, best, pairs)
    outcome = PairOutcome.WORSE if difference.distinguishable else PairOutcome.NOT_DISTINGUISHABLE
    return PairVerdict(other, outcome, difference.non_inferior(margin), difference)


def _difference(a: str, b: str, pairs: pd.DataFrame) -> Difference:
    """a - b, whichever way round the pair is in the table."""
    for row in pairs.to_dict("records"):
        if (row["a"], row["b"]) == (a, b):
            return Difference(row["difference"], row["low"], row["high"], row["p_holm"])
        if (row["b"], row["a"]) == (a, b):
            return Difference(-row["difference"], -row["high"], -row["low"], row["p_holm"])
    raise KeyError((a, b))


def _claim(table: pd.DataFrame, pairs: pd.DataFrame, margin: float) -> Claim:
    names = [str(name) for name in table.index]
    if len(names) < 2:
        return Claim(ClaimOutcome.NOT_TESTED, Reason.ONE_STRATEGY)
    if CLAIMED not in names:
        return Claim(ClaimOutcome.NOT_TESTED, Reason.CLAIMED_NOT_RUN)
    if table["seeds"].min() < MIN_SEEDS:
        return Claim(ClaimOutcome.NOT_DECIDED, Reason.FEW_SEEDS)
    others = [name for name in names if name != CLAIMED]
    differences = {other: _difference(CLAIMED, other, pairs) for other in others}
    unsure = {other: each for other, each in differences.items() if each.low <= -margin}
    if worse := tuple(other for other, each in unsure.items() if each.value < 0 and each.distinguishable):
        return Claim(ClaimOutcome.NOT_SUPPORTED, Reason.WORSE, worse)
    if unsure:
        return Claim(ClaimOutcome.NOT_DECIDED, Reason.NOT_SHOWN_NON_INFERIOR, tuple(unsure))
    return _claim_by_spread(table, [name for name in others if _non_inferior_to_all(name, names, pairs, margin)])


def _non_inferior_to_all(name: str, names: Sequence[str], pairs: pd.DataFrame, margin: float) -> bool:
    return all(_difference(name, other, pairs).non_inferior(margin) for other in names if other != name)


def _claim_by_spread(table: pd.DataFrame, rivals: Sequence[str]) -> Claim:
    """The claim where the claimed strategy is non-inferior to all, as are its `rivals`: the variances decide."""
    own = np.array(table.loc[CLAIMED, f"{PRIMARY}_seeds"])
    p_less = {rival: variance_test(np.array(table.loc[rival, f"{PRIMARY}_seeds"]), own) for rival in rivals}
    if steadier := tuple(rival for rival, p in p_less.items() if p <= LEVEL / 2):
        return Claim(ClaimOutcome.NOT_SUPPORTED, Reason.OTHERS_VARY_LESS, steadier)
    if unsure := tuple(rival for rival, p in p_less.items() if p < 1 - LEVEL / 2):
        return Claim(ClaimOutcome.NOT_DECIDED, Reason.SPREADS_NOT_DISTINGUISHABLE, unsure)
    if missing := tuple(name for name in STRATEGIES if name not in table.index):
        return Claim(ClaimOutcome.NOT_DECIDED, Reason.OTHERS_NOT_RUN, missing)
    return Claim(ClaimOutcome.SUPPORTED, Reason.VARIES_LEAST)


def variance_test(a: Floats, b: Floats) -> float:
    """The one-sided p of the F test that `a` [n] has a smaller variance than `b` [m]; 0.5 where neither varies."""
    ours, theirs = float(a.var(ddof=1)), float(b.var(ddof=1))
    if ours == theirs == 0:
        return 0.5
    return float(stats.f.cdf(ours / theirs, len(a) - 1, len(b) - 1)) if theirs else 1.0
