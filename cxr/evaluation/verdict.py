"""What a comparison of strategies shows, decided by stated rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from cxr.evaluation.paired import LEVEL, PRIMARY, Floats
from cxr.strategies import STRATEGIES

CLAIM = "partial fine-tuning gives the best trade-off between performance and stability"


def verdict(table: pd.DataFrame, pairs: pd.DataFrame, margin: float, metric: str = PRIMARY) -> list[str]:
    """Sentences: who is ahead, who cannot be told from it, and what became of the claim, each by a stated rule.

    Two strategies are *not distinguishable* when Holm's p of their difference is above 0.05. One is *non-inferior* to
    another when the lower end of its difference lies above minus `margin`; *worse*, for the claim, is distinguishable
    and not shown to be non-inferior. The claim is tested with three seeds or more of each strategy. It fails when
    `partial` is worse than another. It holds when `partial` is non-inferior to every other of the four, and varies less
    over the seeds than each other that is so, too (F test of the two variances, two-sided 0.05); it fails when one of
    those varies less. All else leaves it open.
    """
    if len(table) < 2:
        return [f"only {table.index[0]} was run: nothing to compare"]
    best = str(table[metric].idxmax())
    row = table.loc[best]
    fewest, most = int(table["seeds"].min()), int(table["seeds"].max())
    seeds = f"{most} seed(s) each" if fewest == most else f"{fewest} to {most} seeds"
    lines = [
        f"test {metric}, {seeds}: {best} has the highest mean, {row[metric]:.4f} [{row[f'{metric}_low']:.4f}, "
        f"{row[f'{metric}_high']:.4f}]"
    ]
    lines += [_against(best, other, table, pairs, margin) for other in table.index if other != best]
    return [*lines, _claim(table, pairs, margin, metric)]


def _difference(a: str, b: str, pairs: pd.DataFrame) -> tuple[float, float, float, float]:
    """(a - b, low, high, Holm's p), whichever way the pair is in the table."""
    for row in pairs.to_dict("records"):
        if (row["a"], row["b"]) == (a, b):
            return row["difference"], row["low"], row["high"], row["p_holm"]
        if (row["b"], row["a"]) == (a, b):
            return -row["difference"], -row["high"], -row["low"], row["p_holm"]
    raise KeyError((a, b))


def _against(best: str, other: str, table: pd.DataFrame, pairs: pd.DataFrame, margin: float) -> str:
    difference, low, high, p = _difference(other, best, pairs)
    words = "worse than" if p <= LEVEL else "not distinguishable from"
    also = f", non-inferior within {margin:g}" if low > -margin else f", not shown to be non-inferior within {margin:g}"
    names = [f"the one run of {name}" if table.loc[name, "seeds"] == 1 else name for name in (other, best)]
    holm_p = "below 0.001" if p < 0.001 else f"{p:.3f}"
    return f"{names[0]} is {words} {names[1]}: {difference:+.4f} [{low:+.4f}, {high:+.4f}], Holm p {holm_p}{also}"


def _claim(table: pd.DataFrame, pairs: pd.DataFrame, margin: float, metric: str) -> str:
    head = f"the claim that {CLAIM}"
    if "partial" not in table.index:
        return f"{head} was not tested: partial was not run"
    if table["seeds"].min() < 3:
        return f"{head} is not decided: that takes 3 seeds of each strategy"
    others = [name for name in table.index if name != "partial"]
    unsure = [other for other in others if _difference("partial", other, pairs)[1] <= -margin]
    if worse := [other for other in unsure if _is_worse("partial", other, pairs)]:
        return f"{head} is not supported: partial is worse than {', '.join(worse)}"
    if unsure:
        names = ", ".join(unsure)
        return f"{head} is not decided: partial is not shown to be non-inferior (margin {margin:g}) to {names}"
    rivals = [o for o in others if all(_difference(o, x, pairs)[1] > -margin for x in table.index if x != o)]
    return f"{head} {_judged_by_spread(table, rivals, metric)}"


def _judged_by_spread(table: pd.DataFrame, rivals: Sequence[str], metric: str) -> str:
    """The claim's outcome for a `partial` that is non-inferior to all, as are its `rivals`."""
    own = np.array(table.loc["partial", f"{metric}_seeds"])
    p_less = {rival: variance_test(np.array(table.loc[rival, f"{metric}_seeds"]), own) for rival in rivals}
    if steadier := [rival for rival, p in p_less.items() if p <= LEVEL / 2]:
        return f"is not supported: {', '.join(steadier)} performs as well and varies less over the seeds"
    if unsure := [rival for rival, p in p_less.items() if p < 1 - LEVEL / 2]:
        return (
            f"is not decided: {', '.join(unsure)} performs as well, and {len(own)} seeds do not tell which varies less"
        )
    if missing := [name for name in STRATEGIES if name not in table.index]:
        return f"holds among those compared, but is not decided: {', '.join(missing)} was not run"
    return "is supported: non-inferior to all, and of those that are it varies least over the seeds"


def variance_test(a: Floats, b: Floats) -> float:
    """The one-sided p of the F test that `a` [n] has a smaller variance than `b` [m]; 0.5 where neither varies."""
    ours, theirs = float(a.var(ddof=1)), float(b.var(ddof=1))
    if ours == theirs == 0:
        return 0.5
    return float(stats.f.cdf(ours / theirs, len(a) - 1, len(b) - 1)) if theirs else 1.0


def _is_worse(a: str, b: str, pairs: pd.DataFrame) -> bool:
    difference, _, _, p = _difference(a, b, pairs)
    return difference < 0 and p <= LEVEL
