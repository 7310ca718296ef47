"""The page of a comparison: what came out in a sentence, the figures, the tables, and how the numbers were made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from cxr.evaluation.multiclass import PER_CLASS
from cxr.evaluation.paired import RunData, Subject
from cxr.evaluation.predictions import HALF
from cxr.evaluation.report import format_interval, interval_words
from cxr.evaluation.verdict import PairOutcome, Verdict
from cxr.evaluation.verdict_text import sentences
from cxr.figures.html import Matrix, Number, Page, Section
from cxr.figures.strategies import NAMES
from cxr.runs.page import DOUBTS
from cxr.tracking.reading import LoggedRun, Tag

SHOWN = (
    "roc_auc",
    "pr_auc",
    "accuracy",
    "balanced_accuracy",
    "recall",
    "specificity",
    "chosen_accuracy",
    "brier",
    "ece",
)
OWN_NAMES = {"chosen_accuracy": "accuracy at the chosen threshold"}
OF_ENSEMBLES = ("roc_auc", "accuracy", "recall", "specificity")
COST_NAMES = {
    "best_val_loss": "lowest validation loss",
    "val_roc_auc": "validation ROC-AUC",
    "val_test_gap": "ROC-AUC, validation minus test",
    "overfitting_gap": "loss of the last epoch, validation minus training",
    "epoch_spread": "change of validation accuracy between epochs (mean)",
    "parameters_trained": "trained parameters",
    "total_seconds": "seconds of a run",
    "peak_memory_mb": "peak memory, MB",
    "images_per_second": "images/s",
    "training_seconds": "seconds of all epochs",
    "epochs": "epochs",
}
PAIR_NAMES = {"p": "p", "p_holm": "p (Holm)", "p_mcnemar": "McNemar's p", "p_holm_mcnemar": "McNemar's p (Holm)"}
BESIDE = {PairOutcome.WORSE: "worse", PairOutcome.NOT_DISTINGUISHABLE: "not distinguishable from it"}
SIDE_BY_SIDE = 4  # columns of text that fit on a page
OVER = {
    "metrics": "Metrics on the test split: mean over seeds with its 95% interval, and each seed",
    "differences": "Differences of ROC-AUC between two, on the same test images",
    "cost": "Quality against the time of training",
    "roc": "ROC curves on the test split, mean over seeds",
    "classes": "Recall of each class on the test split",
    "curves": "Loss and ROC-AUC on validation, by epoch",
}


@dataclass(frozen=True, slots=True)
class Results:
    """What a comparison came to: the verdict; metrics, pairs and stability as `cxr.evaluation.paired` gives them;
    the mean confusion matrix [k, k] by name; the ensembles of seeds."""

    verdict: Verdict
    metrics: pd.DataFrame
    pairs: pd.DataFrame
    stability: pd.DataFrame
    decisions: Mapping[str, Matrix]
    ensembles: Sequence[LoggedRun] = ()


def comparison_page(
    runs: Sequence[RunData], results: Results, figures: Mapping[str, Figure], remarks: Sequence[str]
) -> Page:
    """The page; `figures` by the names of their files, `remarks` on what a reader needs to know of the numbers."""
    subject, lines = runs[0].subject, sentences(results.verdict)
    title = "Fine-tuning strategies compared" if subject is Subject.STRATEGY else "Backbones compared"
    warnings = [remark for remark in remarks if remark.startswith(DOUBTS)]
    notes = [remark for remark in remarks if remark not in warnings]
    return Page(
        title,
        in_words(results.verdict, runs),
        list(_sections(runs, results, figures, [*lines, *notes])),
        f"{', '.join(results.verdict.seeds)}; {len(runs)} runs",
        warnings,
        list(_numbers(results.metrics)),
    )


def in_words(verdict: Verdict, runs: Sequence[RunData]) -> str:
    """What came out, for a reader who knows none of the terms of the rules."""
    test = runs[0].test
    seeds = sorted(set(verdict.seeds.values()))
    over = f"{seeds[0]} seed{'s' * (seeds[0] > 1)}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    highest = "has the highest mean ROC-AUC" if verdict.pairs else "has a mean ROC-AUC"
    found = interval_words((verdict.mean, verdict.low, verdict.high))
    where = f"On {len(test):,} test images of {test['group'].nunique():,} patients"
    text = f"{where}, {verdict.best} {highest} over {over}: {found}."
    if not verdict.pairs:
        return f"{text} Nothing else was run."
    groups = [(words, [p.strategy for p in verdict.pairs if p.outcome is outcome]) for outcome, words in BESIDE.items()]
    others = [f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {words}" for words, names in groups if names]
    text += f" Of the others, {'; '.join(others)}."
    last = sentences(verdict)[-1]
    return f"{text} {last[0].upper()}{last[1:]}." if verdict.claim else text


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _numbers(metrics: pd.DataFrame) -> Iterator[Number]:
    """ROC-AUC of each, if there are few."""
    for name, row in metrics.head(SIDE_BY_SIDE).iterrows():
        accuracy = f"accuracy {row['accuracy']:.3f}"
        yield Number(f"ROC-AUC of {name}", (row["roc_auc"], row["roc_auc_low"], row["roc_auc_high"]), accuracy)


def _sections(
    runs: Sequence[RunData], results: Results, figures: Mapping[str, Figure], notes: Sequence[str]
) -> Iterator[Section]:
    task = runs[0].task
    rule = f" at a threshold of {HALF}" if task.binary else ""

    def drawn(*names: str) -> dict[str, Figure]:
        return {OVER[name]: figures[name] for name in names if name in figures}

    tables = {f"Test metrics{rule}, mean over seeds": _upright(_readable(results.metrics))}
    if not task.binary:
        tables["Each class on the test split"] = _of_each_class(results.metrics, task.classes, task.slugs)
    yield Section("Which is best", figures=drawn("metrics", "differences"))
    yield Section("The numbers", tables=tables | _of_ensembles(results.ensembles))
    yield Section("Which model", texts=[_which_model(runs, results.ensembles)])
    decisions = {f"{name}: decisions on test{rule}, mean over seeds": each for name, each in results.decisions.items()}
    yield Section("What they miss", matrices=decisions)
    yield Section("At what cost", figures=drawn("cost", "curves"))
    yield Section("Curves", figures=drawn("roc", "classes"))
    shown = [name for name in COST_NAMES if name in results.stability]
    stability = _upright(results.stability[shown].rename(columns=COST_NAMES))
    spreads = _spreads(results.metrics)
    details = {"Pairs: difference of test ROC-AUC": _readable_pairs(results.pairs)} if len(results.pairs) else {}
    details |= {"Standard deviation over seeds": _upright(spreads)} if spreads.size else {}
    yield Section("Details", tables=details | {"Cost and stability, mean over seeds": stability})
    yield Section("How the numbers were made", notes=notes)
    yield Section(
        "Next",
        commands={
            "The models of these runs, and which is the champion": "uv run cxr models list",
            "Try the champion on a film": "uv run --extra demo cxr demo",
            "Compare any finished runs": "uv run cxr compare --runs " + " ".join(run.run_id for run in runs[:2]),
        },
    )


def _which_model(runs: Sequence[RunData], ensembles: Sequence[LoggedRun]) -> str:
    """The run or ensemble with the lowest validation loss, by which champions are chosen, and what became of it."""
    losses = {run.run_id: run.cost["best_val_loss"] for run in runs}
    losses |= {run.run_id: run.metric("val_loss") for run in ensembles}
    best = LoggedRun.open(min(losses, key=lambda run_id: losses[run_id]))
    outcome = best.tags.get(Tag.REGISTERED, "not registered")
    lowest = f"{losses[best.run_id]:.4f}"
    return f"The lowest validation loss, by which a champion is chosen, is {lowest}, that of {best.name}: {outcome}."


def _upright(table: pd.DataFrame) -> pd.DataFrame:
    """A table of few strategies on its side, so that it is not wider than a page."""
    return table.T if len(table) <= SIDE_BY_SIDE else table


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table's metrics as text, such as `0.970` and below it `[0.955, 0.981]`."""
    return pd.DataFrame(
        {
            _name(name): [
                f"{row[name]:.3f}\n[{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" for _, row in table.iterrows()
            ]
            for name in SHOWN
            if name in table
        },
        index=table.index,
    )


def _name(metric: str) -> str:
    return OWN_NAMES.get(metric, NAMES.get(metric, metric))


def _spreads(table: pd.DataFrame) -> pd.DataFrame:
    """The standard deviation of each metric over the seeds, where there are several."""
    names = [name for name in SHOWN if f"{name}_sd" in table]
    found = table[[f"{name}_sd" for name in names]].set_axis([_name(name) for name in names], axis=1)
    return found.dropna(how="all").dropna(axis=1, how="all")


def _readable_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of `paired_table`, differences as text."""
    between = [f"{row['a']} minus {row['b']}" for _, row in pairs.iterrows()]
    texts = [f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]" for _, row in pairs.iterrows()]
    named = pairs[list(PAIR_NAMES)].rename(columns=PAIR_NAMES)
    return named.assign(difference=texts)[["difference", *PAIR_NAMES.values()]].set_index(pd.Index(between))


def _of_each_class(table: pd.DataFrame, classes: Sequence[str], slugs: Sequence[str]) -> pd.DataFrame:
    """A row for each strategy and class, its metrics as text."""
    rows = [
        {"strategy": strategy, "class": name}
        | {
            metric: format_interval(tuple(row[f"{metric}_of_{slug}{end}"] for end in ("", "_low", "_high")))
            for metric in PER_CLASS
        }
        for strategy, row in table.iterrows()
        for name, slug in zip(classes, slugs, strict=True)
    ]
    return pd.DataFrame(rows).set_index("strategy")


def _of_ensembles(ensembles: Sequence[LoggedRun]) -> dict[str, pd.DataFrame]:
    """The test metrics of the ensembles as text, if there are any."""
    rows = {
        f"{run.tags[Tag.STRATEGY]}, {len(run.params['ensemble.runs'].split())} runs": _texts(run) for run in ensembles
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    return {"The seeds of each as one model: an ensemble, registered and evaluated as a whole": table} if rows else {}


def _texts(run: LoggedRun) -> dict[str, str]:
    """Metrics of an ensemble by their readable names."""
    names = [name for name in OF_ENSEMBLES if f"test_{name}" in run.every_metric()]
    bounds = {name: [run.metric(f"test_{name}{end}") for end in ("", "_low", "_high")] for name in names}
    texts = {_name(name): format_interval((value, low, high)) for name, (value, low, high) in bounds.items()}
    return {**texts, "validation loss": f"{run.metric('val_loss'):.4f}"}
