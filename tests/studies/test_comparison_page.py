"""What the page of a comparison says first."""

from __future__ import annotations

import pandas as pd
import pytest
from verdicts import pairs_of, table_of

from cxr.evaluation.paired import RunData, Subject
from cxr.evaluation.verdict import decide
from cxr.studies.comparison_page import in_words

SEEDS = {name: [auc] * 3 for name, auc in (("frozen", 0.9), ("partial", 0.97), ("full", 0.98), ("gradual", 0.975))}
EQUAL, WORSE = (0.0, -0.005, 0.005, 1.0), (-0.08, -0.09, -0.07, 0.0004)
WHERE = "On 4 test images of 2 patients, "


def table(*names: str) -> pd.DataFrame:
    return table_of(**{name: SEEDS[name] for name in names}).assign(roc_auc_low=0.96)


def runs() -> list[RunData]:
    images = pd.DataFrame({"group": ["a", "a", "b", "b"]})
    return [RunData("id", "full", 0, 0.5, images, images, pd.DataFrame(), {})]


def test_the_best_and_those_that_are_worse_or_not_distinguishable_are_named() -> None:
    pairs = pairs_of(
        ("frozen", "full", *WORSE),
        ("partial", "full", *EQUAL),
        ("gradual", "full", *EQUAL),
        ("frozen", "partial", *WORSE),
        ("frozen", "gradual", *WORSE),
        ("partial", "gradual", *EQUAL),
    )
    text = in_words(decide(table(*SEEDS), pairs, 0.01), runs())
    assert text.startswith(
        f"{WHERE}full has the highest mean ROC-AUC over 3 seeds: 0.980 (95% interval 0.960 to 0.990). Of the others, "
        "frozen is worse; partial and gradual are not distinguishable from it. The claim that partial fine-tuning"
    )
    assert text.endswith(".")


@pytest.mark.parametrize("subject", Subject)
def test_a_single_strategy_is_not_compared(subject: Subject) -> None:
    text = in_words(decide(table("full"), pairs_of(), 0.01, subject), runs())
    assert (
        text
        == f"{WHERE}full has a mean ROC-AUC over 3 seeds: 0.980 (95% interval 0.960 to 0.990). Nothing else was run."
    )


def test_backbones_have_no_claim() -> None:
    verdict = decide(table("full", "frozen"), pairs_of(("frozen", "full", *WORSE)), 0.01, Subject.BACKBONE)
    assert in_words(verdict, runs()).endswith("0.990). Of the others, frozen is worse.")
