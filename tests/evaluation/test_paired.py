from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control
from sklearn.metrics import roc_auc_score

from cxr.errors import UserError
from cxr.evaluation.metrics import DECISION_METRICS, METRICS
from cxr.evaluation.paired import (
    PRIMARY,
    Replicates,
    RunData,
    holm,
    mcnemar,
    paired_table,
    replicate,
    require_same_images,
    stability_table,
    strategy_table,
)
from cxr.evaluation.verdict import Claim, ClaimOutcome, PairOutcome, Reason, Verdict, decide, variance_test
from cxr.task import Task

SUPPORTED = Claim(ClaimOutcome.SUPPORTED, Reason.VARIES_LEAST)
FEW_SEEDS = Claim(ClaimOutcome.NOT_DECIDED, Reason.FEW_SEEDS)
LABELS = np.repeat([0, 1], [120, 180])

COMPARED = (*METRICS, *(f"chosen_{name}" for name in DECISION_METRICS))


def run(strategy: str, seed: int = 0, signal: float = 2.0, noise: float = 0.2) -> RunData:
    """A run whose scores combine a difficulty shared by all runs with independent `noise`."""
    difficulty = np.random.default_rng(7).normal(size=300)
    own = np.random.default_rng([seed, *strategy.encode()]).normal(size=300)
    margin = signal * (LABELS - 0.5) * 2 + difficulty + noise * own
    table = pd.DataFrame(
        {
            "digest": [f"{i}" for i in range(300)],
            "group": [f"p{i // 2}" for i in range(300)],
            "label": LABELS,
            "probability": 1 / (1 + np.exp(-margin)),
        }
    )
    history = pd.DataFrame(
        {"val_accuracy": [0.5, 0.7, 0.6], "val_loss": [0.7, 0.5, 0.6], "train_loss": [0.6, 0.4, 0.2]}
    )
    return RunData(f"{strategy}{seed}", strategy, seed, 0.4, table, table, history, {"total_seconds": 10.0})


def tables(runs: list[RunData]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row for each strategy, a row for each pair)."""
    replicates = replicate(runs, 400)
    return strategy_table(replicates), paired_table(runs, replicates)


def judged(runs: list[RunData], margin: float = 0.02) -> Verdict:
    return decide(*tables(runs), margin)


def test_the_table_has_means_and_standard_deviations_over_seeds() -> None:
    runs = [run("frozen", s, noise=2) for s in range(3)] + [run("full")]
    table, _ = tables(runs)
    aucs = [roc_auc_score(LABELS, r.test["probability"]) for r in runs[:3]]
    assert table.loc["frozen", "roc_auc"] == pytest.approx(np.mean(aucs))
    assert table.loc["frozen", "roc_auc_sd"] == pytest.approx(np.std(aucs, ddof=1))
    assert table.loc["frozen", "roc_auc_seeds"] == pytest.approx(aucs)
    assert np.isnan(table.loc["full", "roc_auc_sd"])
    assert (table["roc_auc_low"] <= table["roc_auc"]).all()
    assert {f"{name}_high" for name in COMPARED} <= set(table.columns)
    assert table.loc["full", "chosen_recall"] > table.loc["full", "recall"]


def test_pairing_distinguishes_strategies_whose_intervals_overlap() -> None:
    runs = [run("frozen", s, signal=1.3, noise=0.1) for s in range(3)]
    runs += [run("partial", s, signal=1.6, noise=0.1) for s in range(3)]
    table, pairs = tables(runs)
    assert table.loc["frozen", "roc_auc_high"] > table.loc["partial", "roc_auc_low"]
    (row,) = pairs.to_dict("records")
    assert row["high"] < 0
    assert row["p_holm"] < 0.05


def test_equal_strategies_are_not_distinguishable() -> None:
    runs = [run(s, seed) for s in ("frozen", "partial", "full") for seed in range(3)]
    assert (tables(runs)[1]["p_holm"] > 0.05).all()
    assert [pair.outcome for pair in judged(runs).pairs] == [PairOutcome.NOT_DISTINGUISHABLE] * 2


def test_an_interval_has_about_its_nominal_coverage() -> None:
    rng, hits = np.random.default_rng(0), 0
    for trial in range(60):
        a, b = run("frozen", trial, noise=1), run("partial", trial, noise=1)
        rows = rng.integers(0, 150, 150)
        chosen = np.concatenate([[2 * r, 2 * r + 1] for r in rows])
        parts = []
        for each in (a, b):
            table = each.test.iloc[chosen].assign(group=np.repeat(np.arange(150), 2)).reset_index(drop=True)
            parts.append(RunData(each.run_id, each.strategy, 0, 0.5, table, table, each.history, {}))
        row = paired_table(parts, replicate(parts, 200)).iloc[0]
        truth = np.subtract(*(roc_auc_score(LABELS, each.test["probability"]) for each in (a, b)))
        hits += row["low"] <= truth <= row["high"]
    assert 50 <= hits <= 60


@pytest.mark.parametrize(
    ("signals", "seeds", "claim"),
    [
        ({"frozen": 1.0, "partial": 2.0, "full": 2.0, "gradual": 2.0}, 5, SUPPORTED),
        (
            {"frozen": 1.0, "partial": 2.0, "full": 2.0},
            5,
            Claim(ClaimOutcome.NOT_DECIDED, Reason.OTHERS_NOT_RUN, ("gradual",)),
        ),
        (
            {"frozen": 1.0, "partial": 1.2, "full": 2.5},
            3,
            Claim(ClaimOutcome.NOT_SUPPORTED, Reason.WORSE, ("full",)),
        ),
        ({"frozen": 1.0, "partial": 1.2, "full": 2.5}, 1, FEW_SEEDS),
        ({"frozen": 1.0, "partial": 2.0, "full": 2.0}, 2, FEW_SEEDS),
        ({"frozen": 1.0, "full": 2.0}, 3, Claim(ClaimOutcome.NOT_TESTED, Reason.CLAIMED_NOT_RUN)),
    ],
)
def test_the_claim_is_judged_by_its_rule(signals: dict[str, float], seeds: int, claim: Claim) -> None:
    noise = {"partial": 0.01, "full": 0.3, "frozen": 0.3, "gradual": 0.3}
    runs = [run(name, seed, signal, noise[name]) for name, signal in signals.items() for seed in range(seeds)]
    assert judged(runs, margin=0.03).claim == claim


def test_a_steadier_equal_refutes_the_claim_and_wide_intervals_leave_it_open() -> None:
    noise = {"partial": (2.25, 0.5), "full": (2.0, 0.01)}
    runs = [run(name, seed, *how) for name, how in noise.items() for seed in range(4)]
    steadier = Claim(ClaimOutcome.NOT_SUPPORTED, Reason.OTHERS_VARY_LESS, ("full",))
    assert judged(runs, margin=0.03).claim == steadier
    assert judged(runs, margin=1e-5).claim.reason is Reason.NOT_SHOWN_NON_INFERIOR


def test_variances_that_three_seeds_cannot_distinguish_decide_nothing() -> None:
    runs = [run(name, seed, 2.2, 0.3) for name in ("partial", "full") for seed in range(3)]
    open_claim = Claim(ClaimOutcome.NOT_DECIDED, Reason.SPREADS_NOT_DISTINGUISHABLE, ("full",))
    assert judged(runs, margin=0.03).claim == open_claim


def test_a_strategy_worse_within_the_margin_does_not_refute_the_claim() -> None:
    runs = [run(name, seed, how, 0.01) for name, how in {"partial": 1.6, "full": 1.8}.items() for seed in range(3)]
    verdict = judged(runs, margin=0.03)
    (pair,) = verdict.pairs
    assert pair.difference.p_holm < 0.05
    assert (pair.strategy, pair.outcome, pair.non_inferior) == ("partial", PairOutcome.WORSE, True)
    assert verdict.claim.reason is not Reason.WORSE


def test_seeds_that_differ_do_not_prove_a_difference() -> None:
    """Both strategies are equal except for chance in three seeds; resampling only images would give p < 0.05."""
    lucky = {"frozen": (1.6, 2.0, 2.1), "partial": (2.2, 2.4, 2.6)}
    runs = [run(name, seed, signal, 0.05) for name, signals in lucky.items() for seed, signal in enumerate(signals)]
    assert tables(runs)[1]["p"].iloc[0] > 0.05


def equal_strategies(rng: np.random.Generator, seeds: tuple[int, ...], patients: float, training: float) -> Replicates:
    """Equal strategies with a mean of 0.9, the given sds over patients and seeds, and simulated bootstrap resamples."""
    names = ("frozen", "partial", "full", "gradual")[: len(seeds)]
    means = {name: 0.9 + rng.normal(0, patients) for name in names}
    points = {n: {PRIMARY: means[n] + rng.normal(0, training, k)} for n, k in zip(names, seeds, strict=True)}
    draws = {n: {PRIMARY: points[n][PRIMARY].mean() + rng.normal(0, patients, 400)} for n in names}
    return Replicates(points, draws, 400)


@pytest.mark.parametrize("seeds", [(3, 3, 3, 3), (5, 5, 5, 5), (3, 3, 1, 1), (2, 2)])
@pytest.mark.parametrize("patients", [0.004, 0.0005])
def test_the_family_wise_error_rate_is_as_stated(seeds: tuple[int, ...], patients: float) -> None:
    """5% of families, here with few seeds of high variance. Resampling the seeds would reject up to 38%."""
    rng, runs, wrong = np.random.default_rng(0), [run(s) for s in ("frozen", "partial", "full", "gradual")], 0
    for _ in range(200):
        wrong += bool((paired_table(runs, equal_strategies(rng, seeds, patients, 0.0075))["p_holm"] <= 0.05).any())
    assert wrong <= 22


def test_the_interval_of_a_strategy_has_its_coverage_with_few_seeds_of_high_variance() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        replicates = equal_strategies(rng, (3, 3, 3, 3), 0.002, 0.0075)
        full = {name: dict.fromkeys(COMPARED, each[PRIMARY]) for name, each in replicates.points.items()}
        draws = {name: dict.fromkeys(COMPARED, each[PRIMARY]) for name, each in replicates.draws.items()}
        table = strategy_table(Replicates(full, draws, 400))
        hits += int(table["roc_auc_low"].le(0.9).mul(table["roc_auc_high"].ge(0.9)).sum())
    assert 370 <= hits <= 395


def test_without_a_second_patient_there_is_no_interval() -> None:
    replicates = equal_strategies(np.random.default_rng(0), (3, 3), 0.01, 0.01)
    alone = Replicates(replicates.points, replicates.draws, 1)
    row = paired_table([run("frozen"), run("partial")], alone).iloc[0]
    assert np.isnan([row["low"], row["high"]]).all()
    assert row["p"] == 1


def test_the_variance_test_is_one_sided_and_knows_no_difference_between_constants() -> None:
    quiet, loud = np.array([0.9, 0.901, 0.899, 0.9]), np.array([0.8, 0.95, 0.7, 0.9])
    assert variance_test(quiet, loud) < 0.01
    assert variance_test(loud, quiet) == pytest.approx(1 - variance_test(quiet, loud))
    assert variance_test(np.ones(3), np.ones(3)) == 0.5


def test_one_strategy_has_nothing_to_compare() -> None:
    verdict = judged([run("full")])
    assert verdict.pairs == ()
    assert verdict.claim == Claim(ClaimOutcome.NOT_TESTED, Reason.ONE_STRATEGY)


def test_runs_on_different_images_and_duplicates_are_rejected() -> None:
    other = run("full")
    moved = RunData("x", "full", 0, 0.5, other.val, other.test.iloc[::-1], other.history, {})
    renamed = replace(other, run_id="y", seed=1, task=Task(("well", "ill")))
    with pytest.raises(UserError, match="different classes"):
        require_same_images([other, renamed])
    with pytest.raises(UserError, match="different images"):
        require_same_images([run("partial"), moved])
    with pytest.raises(UserError, match="duplicate runs: full seed 0"):
        require_same_images([other, other])


def test_stability_is_computed_from_the_history() -> None:
    table = stability_table([run("full", s) for s in range(2)])
    assert table.loc["full", "epoch_spread"] == pytest.approx(0.15)
    assert table.loc["full", "overfitting_gap"] == pytest.approx(0.4)
    assert table.loc["full", "val_test_gap"] == 0
    assert table.loc["full", "total_seconds"] == 10


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_ordered_and_between_the_raw_and_bonferroni(p: list[float]) -> None:
    raw = np.array(p)
    adjusted = holm(raw)
    assert (adjusted >= raw).all()
    assert (adjusted <= np.minimum(raw * len(raw), 1) + 1e-12).all()
    assert (adjusted >= false_discovery_control(raw) - 1e-12).all()
    assert (np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0).all()


def test_mcnemar_is_the_exact_sign_test_of_the_discordant() -> None:
    a, b = np.array([True] * 8 + [False] * 2 + [True] * 5), np.array([False] * 8 + [True] * 2 + [True] * 5)
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(a, a) == 1
