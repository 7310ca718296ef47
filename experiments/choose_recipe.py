"""Which views, and averaged weights or not? Judged on validation images alone: the test split is never read.

    uv run python experiments/choose_recipe.py --data-dir FOLDER --seeds 3 --epochs 6 --views 6 --out arms.csv

Result in LOG.md: "2026-11-25: views and averaging, chosen on validation".

Trains each recipe of views, with and without averaged weights, with each seed; the best epoch is that with the lowest
stressed validation loss. Then every validation image is shown plain and under every stress. The table holds the loss
(weighted by class) and balanced accuracy, plain, under each stress, and on average over the stresses. A row is written
as soon as its run is finished; the same command continues after an interruption.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import pandas as pd

from common import trained
from cxr.config import TrainConfig
from cxr.data.load import Data, read_data
from cxr.machine import Machine, ready_machine
from validation import shown

ARM = ["strategy", "lr", "recipe", "average", "seed"]


def one(config: TrainConfig, data: Data, machine: Machine) -> dict[str, object]:
    """Train one arm with one seed."""
    started = time.perf_counter()
    model, records = trained(config, data, machine)
    best = [record for record in records if record.improved][-1]
    steps = sum(record.metrics["epoch_seconds"] for record in records)
    stressed = sum(record.metrics["eval_seconds"] for record in records)
    return {
        **dict(zip(ARM, (config.strategy, config.lr_top, config.augment, config.average, config.seed), strict=True)),
        "best epoch": best.epoch,
        "val AUC": best.metrics["val_roc_auc"],
        "training s": steps,
        "validation s": stressed,
        "all s": time.perf_counter() - started,
        **shown(config, data, machine, model),
    }


@click.command()
@click.option("--data-dir", required=True)
@click.option("--weights", default="auto", show_default=True)
@click.option("--strategy", default="partial", show_default=True)
@click.option("--lr-top", default=5e-4, show_default=True)
@click.option("--recipes", default="mild-1,crops-1,crops-2", show_default=True)
@click.option("--averages", default="none,sma", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=6, show_default=True)
@click.option("--views", default=6, show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--out", type=Path, required=True)
def main(recipes: str, averages: str, seeds: int, out: Path, **parameters: Any) -> None:
    """Run every arm that the table lacks, and print the table."""
    config = TrainConfig(**parameters, select="stressed_val_loss", reuse_gb=12.0)
    machine, data = ready_machine(config), read_data(config)
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    done = {tuple(str(row[name]) for name in ARM) for row in rows}
    for seed, recipe, average in product(range(seeds), recipes.split(","), averages.split(",")):
        if (config.strategy, str(config.lr_top), recipe, average, str(seed)) not in done:
            rows.append(one(replace(config, augment=recipe, average=average, seed=seed), data, machine))
            pd.DataFrame(rows).to_csv(out, index=False)
    table = pd.DataFrame(rows)
    means = table.drop(columns="seed").groupby(ARM[:-1], sort=False)
    click.echo(pd.concat({"mean": means.mean(), "sd": means.std()}, axis=1).swaplevel(axis=1).T.round(4).to_string())


if __name__ == "__main__":
    main()
