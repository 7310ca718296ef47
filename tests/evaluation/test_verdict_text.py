"""The sentences of a verdict to the letter: the last of them is logged as a tag."""

from __future__ import annotations

import pytest
from verdicts import pairs_of, table_of

from cxr.evaluation.paired import Subject
from cxr.evaluation.verdict import ClaimOutcome, PairOutcome, Reason, decide
from cxr.evaluation.verdict_text import REASONS, sentences

# ROC-AUC of five seeds that vary little, and of five that vary much.
STEADY, LOOSE = [0.9700, 0.9701, 0.9702, 0.9703, 0.9704], [0.94, 0.95, 0.97, 0.99, 1.0]
EQUAL = (0.0, -0.005, 0.005, 1.0)  # non-inferior either way
WORSE = (-0.03, -0.04, -0.02, 0.0004)
OPEN = (-0.002, -0.0105, 0.0062, 0.35)
CASES = {
    "one strategy": (table_of(full=STEADY), pairs_of()),
    "partial not run": (table_of(frozen=[0.9], full=[0.95]), pairs_of(("frozen", "full", -0.05, -0.06, 0.001, 0.0512))),
    "few seeds": (table_of(partial=[0.9], full=[0.95, 0.96]), pairs_of(("full", "partial", 0.055, 0.01, 0.06, 0.01))),
    "worse": (
        table_of(partial=STEADY, full=[0.99] * 5, gradual=[1.0] * 5),
        pairs_of(
            ("partial", "full", *WORSE), ("gradual", "partial", 0.03, 0.02, 0.04, 0.002), ("full", "gradual", *OPEN)
        ),
    ),
    "not shown": (table_of(partial=STEADY, full=[0.99] * 5), pairs_of(("partial", "full", *OPEN))),
    "steadier": (table_of(partial=LOOSE, full=STEADY), pairs_of(("partial", "full", *EQUAL))),
    "spreads alike": (table_of(partial=LOOSE[:3], full=LOOSE[1:4]), pairs_of(("partial", "full", *EQUAL))),
    "holds among some": (
        table_of(frozen=LOOSE, partial=STEADY),
        pairs_of(("frozen", "partial", *EQUAL)),
    ),
    "supported": (
        table_of(frozen=[0.9] * 5, partial=STEADY, full=LOOSE, gradual=LOOSE),
        pairs_of(
            ("frozen", "partial", *WORSE),
            ("frozen", "full", *WORSE),
            ("frozen", "gradual", *WORSE),
            ("partial", "full", *EQUAL),
            ("partial", "gradual", *EQUAL),
            ("full", "gradual", *EQUAL),
        ),
    ),
}


HEAD = "the claim that partial fine-tuning gives the best trade-off between performance and stability"
# As the program wrote them before its decisions and its words were separated.
SENTENCES = {
    "one strategy": [
        "only full was run: nothing to compare",
    ],
    "partial not run": [
        "test roc_auc, 1 seed(s) each: full has the highest mean, 0.9500 [0.9000, 0.9900]",
        "the one run of frozen is not distinguishable from the one run of full: -0.0500 [-0.0600, +0.0010], "
        "Holm p 0.051, not shown to be non-inferior within 0.01",
        f"{HEAD} was not tested: partial was not run",
    ],
    "few seeds": [
        "test roc_auc, 1 to 2 seeds: full has the highest mean, 0.9550 [0.9000, 0.9900]",
        "the one run of partial is worse than full: -0.0550 [-0.0600, -0.0100], Holm p 0.010",
        f"{HEAD} is not decided: that takes 3 seeds of each strategy",
    ],
    "worse": [
        "test roc_auc, 5 seed(s) each: gradual has the highest mean, 1.0000 [0.9000, 0.9900]",
        "partial is worse than gradual: -0.0300 [-0.0400, -0.0200], Holm p 0.002",
        "full is not distinguishable from gradual: -0.0020 [-0.0105, +0.0062], "
        "Holm p 0.350, not shown to be non-inferior within 0.01",
        f"{HEAD} is not supported: partial is worse than full, gradual",
    ],
    "not shown": [
        "test roc_auc, 5 seed(s) each: full has the highest mean, 0.9900 [0.9000, 0.9900]",
        "partial is not distinguishable from full: -0.0020 [-0.0105, +0.0062], "
        "Holm p 0.350, not shown to be non-inferior within 0.01",
        f"{HEAD} is not decided: partial is not shown to be non-inferior (margin 0.01) to full",
    ],
    "steadier": [
        "test roc_auc, 5 seed(s) each: full has the highest mean, 0.9702 [0.9000, 0.9900]",
        "partial is not distinguishable from full: +0.0000 [-0.0050, +0.0050], Holm p 1.000, non-inferior within 0.01",
        f"{HEAD} is not supported: full performs as well and varies less over the seeds",
    ],
    "spreads alike": [
        "test roc_auc, 3 seed(s) each: full has the highest mean, 0.9700 [0.9000, 0.9900]",
        "partial is not distinguishable from full: +0.0000 [-0.0050, +0.0050], Holm p 1.000, non-inferior within 0.01",
        f"{HEAD} is not decided: full performs as well, and 3 seeds do not tell which varies less",
    ],
    "holds among some": [
        "test roc_auc, 5 seed(s) each: partial has the highest mean, 0.9702 [0.9000, 0.9900]",
        "frozen is not distinguishable from partial: +0.0000 [-0.0050, +0.0050], "
        "Holm p 1.000, non-inferior within 0.01",
        f"{HEAD} holds among those compared, but is not decided: full, gradual was not run",
    ],
    "supported": [
        "test roc_auc, 5 seed(s) each: partial has the highest mean, 0.9702 [0.9000, 0.9900]",
        "frozen is worse than partial: -0.0300 [-0.0400, -0.0200], Holm p below 0.001",
        "full is not distinguishable from partial: -0.0000 [-0.0050, +0.0050], Holm p 1.000, non-inferior within 0.01",
        "gradual is not distinguishable from partial: -0.0000 [-0.0050, +0.0050], "
        "Holm p 1.000, non-inferior within 0.01",
        f"{HEAD} is supported: non-inferior to all, and of those that are it varies least over the seeds",
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_the_sentences_are_these_to_the_letter(case: str) -> None:
    assert sentences(decide(*CASES[case], 0.01)) == SENTENCES[case]


def test_the_cases_cover_every_outcome_and_reason() -> None:
    verdicts = [decide(*case, 0.01) for case in CASES.values()]
    assert {verdict.claim.reason for verdict in verdicts} == set(Reason) == REASONS.keys() | {Reason.ONE_STRATEGY}
    assert {verdict.claim.outcome for verdict in verdicts} == set(ClaimOutcome)
    assert {pair.outcome for verdict in verdicts for pair in verdict.pairs} == set(PairOutcome)


def test_of_backbones_the_last_sentence_sums_up() -> None:
    table = table_of(swin_t=[0.9] * 3, resnet18=[0.95] * 3, resnet50=[0.96] * 3)
    pairs = pairs_of(("swin_t", "resnet18", *WORSE), ("swin_t", "resnet50", *WORSE), ("resnet18", "resnet50", *OPEN))
    verdict = decide(table, pairs, 0.01, Subject.BACKBONE)
    assert verdict.claim is None
    assert sentences(verdict)[-1] == (
        "of the backbones, resnet50 has the highest mean: swin_t worse than it; resnet18 not distinguishable from it"
    )
