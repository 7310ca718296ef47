"""The sentences of a verdict. The last of them is logged as a tag, so their wording is an interface."""

from __future__ import annotations

from cxr.evaluation.paired import PRIMARY
from cxr.evaluation.verdict import CLAIMED, MIN_SEEDS, Claim, ClaimOutcome, PairOutcome, PairVerdict, Reason, Verdict

CLAIM = "partial fine-tuning gives the best trade-off between performance and stability"
PAIRS = {PairOutcome.WORSE: "worse than", PairOutcome.NOT_DISTINGUISHABLE: "not distinguishable from"}
OUTCOMES = {
    ClaimOutcome.SUPPORTED: "is supported",
    ClaimOutcome.NOT_SUPPORTED: "is not supported",
    ClaimOutcome.NOT_DECIDED: "is not decided",
    ClaimOutcome.NOT_TESTED: "was not tested",
}
# Filled with `others`, `margin` and `seeds` (those of the claimed strategy).
REASONS = {
    Reason.CLAIMED_NOT_RUN: f"{CLAIMED} was not run",
    Reason.FEW_SEEDS: f"that takes {MIN_SEEDS} seeds of each strategy",
    Reason.WORSE: f"{CLAIMED} is worse than {{others}}",
    Reason.NOT_SHOWN_NON_INFERIOR: f"{CLAIMED} is not shown to be non-inferior (margin {{margin:g}}) to {{others}}",
    Reason.OTHERS_VARY_LESS: "{others} performs as well and varies less over the seeds",
    Reason.SPREADS_NOT_DISTINGUISHABLE: "{others} performs as well, and {seeds} seeds do not tell which varies less",
    Reason.OTHERS_NOT_RUN: "{others} was not run",
    Reason.VARIES_LEAST: "non-inferior to all, and of those that are it varies least over the seeds",
}


def sentences(verdict: Verdict) -> list[str]:
    """The best strategy, each other strategy against it, the claim; a single sentence if only one strategy was run.

    Of backbones, the last sentence sums up instead.
    """
    if not verdict.pairs:
        return [f"only {verdict.best} was run: nothing to compare"]
    last = _claim(verdict, verdict.claim) if verdict.claim else _summed_up(verdict)
    return [_best(verdict), *(_pair(pair, verdict) for pair in verdict.pairs), last]


def _best(verdict: Verdict) -> str:
    fewest, most = min(verdict.seeds.values()), max(verdict.seeds.values())
    seeds = f"{most} seed(s) each" if fewest == most else f"{fewest} to {most} seeds"
    interval = f"{verdict.mean:.4f} [{verdict.low:.4f}, {verdict.high:.4f}]"
    return f"test {PRIMARY}, {seeds}: {verdict.best} has the highest mean, {interval}"


def _pair(pair: PairVerdict, verdict: Verdict) -> str:
    own, best = (
        f"the one run of {name}" if verdict.seeds[name] == 1 else name for name in (pair.strategy, verdict.best)
    )
    each = pair.difference
    interval = f"{each.value:+.4f} [{each.low:+.4f}, {each.high:+.4f}]"
    p = "below 0.001" if each.p_holm < 0.001 else f"{each.p_holm:.3f}"
    shown = "non-inferior" if pair.non_inferior else "not shown to be non-inferior"
    tail = f", {shown} within {verdict.margin:g}" if pair.non_inferior or pair.outcome is not PairOutcome.WORSE else ""
    return f"{own} is {PAIRS[pair.outcome]} {best}: {interval}, Holm p {p}{tail}"


def _summed_up(verdict: Verdict) -> str:
    """Of a comparison of backbones."""
    groups = {
        outcome: ", ".join(pair.strategy for pair in verdict.pairs if pair.outcome is outcome)
        for outcome in PairOutcome
    }
    parts = [f"{names} {PAIRS[outcome]} it" for outcome, names in groups.items() if names]
    return f"of the backbones, {verdict.best} has the highest mean: {'; '.join(parts)}"


def _claim(verdict: Verdict, claim: Claim) -> str:
    reason = REASONS[claim.reason].format(
        others=", ".join(claim.others), margin=verdict.margin, seeds=verdict.seeds.get(CLAIMED)
    )
    but = "holds among those compared, but " if claim.reason is Reason.OTHERS_NOT_RUN else ""
    return f"the claim that {CLAIM} {but}{OUTCOMES[claim.outcome]}: {reason}"
