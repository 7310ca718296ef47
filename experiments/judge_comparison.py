"""What was to be judged after a comparison: the selected strategy, the champion, published figures, criteria.

    uv run python experiments/judge_comparison.py PARENT [PARENT …]

Results in LOG.md: "2026-11-26: four strategies x five seeds with what validation chose".

Reads the finished comparisons (parent runs) of a tracking store; it trains nothing and looks at no image. The first is
the comparison that is judged; the runs of all enter the correlations between the criteria of validation and the metrics
on test, which are analysis after the fact: nothing may be chosen by them.
"""

from __future__ import annotations

import click
import numpy as np
import pandas as pd
import torch
from scipy.special import softmax

from cxr.evaluation.paired import replicate, strategy_table
from cxr.evaluation.predictions import HALF
from cxr.evaluation.report import evaluate, format_interval, weighted_loss
from cxr.runs.ensemble import member_logits
from cxr.studies.compare import load_run
from cxr.tracking.nested import children
from cxr.tracking.reading import LoggedRun, RunKind

PUBLISHED = {
    "AutoML (Kermany et al.'s set)": {"accuracy": 0.946, "roc_auc": 0.991},
    "Doerrich et al., ResNet-18": {"accuracy": 0.911, "roc_auc": 0.980},
}
MARGIN = 0.01
CRITERIA = ("val_loss", "stressed_val_loss", "worst_stress", "val_roc_auc")
ON_TEST = ("test_roc_auc", "test_accuracy", "test_log_loss")
RESAMPLES = 2000


def row(run: LoggedRun, parent: int) -> dict[str, object]:
    """The criteria and the metrics on test of a run, or of an ensemble."""
    best = int(run.tags.get("best_epoch", -1))
    val_loss = run.history("val_loss").get(best, run.metric("val_loss"))
    stresses = [value for name, value in run.every_metric().items() if name.startswith("stressed_val_loss_")]
    params = run.train_params()
    return {
        "comparison": parent,
        "what": "ensemble" if run.kind is RunKind.ENSEMBLE else "run",
        "strategy": run.tags["strategy"],
        "seed": run.tags.get("seed", ""),
        "augment": params["augment"],
        "average": params["average"],
        "val_loss": val_loss,
        "stressed_val_loss": run.metric("stressed_val_loss"),
        "worst_stress": max(stresses, default=np.nan),
        "val_roc_auc": run.metric("val_roc_auc"),
        **{name: run.metric(name) for name in (*ON_TEST, "test_recall", "test_specificity", "test_ece")},
        "test_unfamiliar": run.metric("test_unfamiliar"),
        "test_abstained": run.metric("test_abstained"),
        "test_kept_accuracy": run.metric("test_kept_accuracy"),
        "run": run.run_id,
    }


def ensembles(runs: list[LoggedRun]) -> pd.DataFrame:
    """What the seeds of each strategy answer together, from the logits that they logged; nothing is calibrated."""
    rows = []
    for strategy in dict.fromkeys(run.tags["strategy"] for run in runs):
        members = [run for run in runs if run.tags["strategy"] == strategy]
        part = members[0].predictions("val")
        names = members[0].task.keys
        weights = torch.tensor([float(members[0].params[f"class_weight.{name}"]) for name in names])
        labels = torch.tensor(part["label"].to_numpy(np.int64))
        loss = weighted_loss(torch.tensor(member_logits(members, "val")), labels, weights)
        table = members[0].predictions("test")
        table["probability"] = softmax(member_logits(members, "test"), 1)[:, 1]
        report = evaluate(table, "test", HALF, RESAMPLES)
        found = {metric: format_interval(report.interval(metric)) for metric in ("accuracy", "roc_auc", "specificity")}
        rows.append({"ensemble": strategy, "members": len(members), "val_loss": round(loss, 4), **found})
    return pd.DataFrame(rows)


def spearman(runs: pd.DataFrame) -> pd.DataFrame:
    """Criterion -> its rank correlation with each metric on test."""
    return runs[[*CRITERIA, *ON_TEST]].corr("spearman").loc[list(CRITERIA), list(ON_TEST)]


def non_inferiority(table: pd.DataFrame, strategy: str) -> pd.DataFrame:
    """The selected strategy against published figures: its lower end must lie above them, less `MARGIN`."""
    rows = []
    for name, figures in PUBLISHED.items():
        for metric, figure in figures.items():
            own, low, high = (float(table.loc[strategy, f"{metric}{end}"]) for end in ("", "_low", "_high"))
            rows.append((name, metric, figure, own, low, high, low > figure - MARGIN, low > figure))
    columns = ["published", "metric", "figure", "ours", "low", "high", "non-inferior", "superior"]
    return pd.DataFrame(rows, columns=columns)


@click.command()
@click.argument("parents", nargs=-1, required=True)
def main(parents: tuple[str, ...]) -> None:
    """Print everything that was to be judged."""
    found = [(number, run) for number, parent in enumerate(parents) for run in children(parent) if run.finished]
    table = pd.DataFrame([row(run, number) for number, run in found])
    first, runs = table[table["comparison"] == 0], table[table["what"] == "run"]
    click.echo(table.drop(columns="run").round(4).to_string(index=False))
    arms = runs.groupby(["strategy", "augment", "average"], sort=False)[[*CRITERIA, *ON_TEST, "test_specificity"]]
    click.echo("\nmeans and standard deviations over seeds")
    click.echo(pd.concat({"mean": arms.mean(), "sd": arms.std()}, axis=1).swaplevel(axis=1).round(4).T.to_string())
    own = first[first["what"] == "run"]
    selected = str(own.groupby("strategy")["val_loss"].mean().idxmin())
    click.echo(f"\nselected by the lowest mean val_loss: {selected}")
    data = [load_run(run_id) for run_id in own["run"]]
    strategies = strategy_table(replicate(data, RESAMPLES))
    click.echo(non_inferiority(strategies, selected).round(4).to_string(index=False))
    members = [run for number, run in found if number == 0 and run.kind is not RunKind.ENSEMBLE]
    click.echo(f"\n{ensembles(members).to_string(index=False)}")
    champion = first.loc[first["val_loss"].idxmin()]
    click.echo(f"\nchampion by val_loss: {champion['what']} {champion['strategy']} {champion['seed']}")
    for metric in ("test_roc_auc", "test_accuracy"):
        click.echo(f"{metric}: champion {champion[metric]:.4f}, best {first[metric].max():.4f}")
    click.echo(f"\nSpearman's correlation over {len(runs)} runs (of criteria with metrics on test)")
    click.echo(spearman(runs).round(2).to_string())
    click.echo("\nwithin strategies and recipes (mean of their correlations)")
    arms = runs.groupby(["strategy", "augment", "average"], sort=False)
    click.echo(pd.concat([spearman(arm) for _, arm in arms]).groupby(level=0).mean().round(2).to_string())


if __name__ == "__main__":
    main()
