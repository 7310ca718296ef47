"""Whether the fast path changes results: the same configuration and seeds with and without reuse, side by side.

    uv run python experiments/fast_path.py --data-dir FOLDER --strategies frozen,partial --epochs 4 --seeds 2

With reuse, what the frozen prefix gives is computed once for each view and looked up; without, it is computed in every
epoch. Epochs should outnumber the views (three), or keeping does not pay and is not done. Prints how much was kept,
validation loss, test ROC-AUC and accuracy of both, the largest difference between their test
probabilities (0 is expected), and the training seconds.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pandas as pd

from cxr.config import TrainConfig
from cxr.runs.result import RunResult
from cxr.runs.train import run
from cxr.storage import Cache
from cxr.tracking.tracker import NullTracker


def one(config: TrainConfig) -> RunResult:
    """The run, untracked."""
    return run(config, NullTracker(), lambda line: None)


def row(result: RunResult) -> dict[str, float]:
    """The figures to hold against each other."""
    history = result.history
    return {
        "val_loss": result.best.metrics["val_loss"],
        "test_roc_auc": result.test.values["roc_auc"],
        "test_accuracy": result.test.values["accuracy"],
        "seconds": float((history["epoch_seconds"] + history["eval_seconds"]).sum()),
    }


@click.command()
@click.option("--data-dir", required=True)
@click.option("--weights", default="random", show_default=True)
@click.option("--strategies", default="frozen,partial", show_default=True)
@click.option("--epochs", default=4, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--image-size", default=224, show_default=True)
def main(
    data_dir: str, weights: str, strategies: str, epochs: int, seeds: int, precision: str, image_size: int
) -> None:
    """Run every configuration twice and print the table."""
    rows = []
    for strategy in strategies.split(","):
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as cache:
                config = TrainConfig(
                    strategy=strategy,
                    seed=seed,
                    data_dir=data_dir,
                    weights=weights,
                    epochs=epochs,
                    precision=precision,
                    image_size=image_size,
                    calibration="none",
                    bootstrap=0,
                    cache_dir=cache,
                )
                pair = [one(replace(config, reuse_gb=reuse)) for reuse in (0.0, 4.0)]
                kept = sum(each.size for each in Cache(Path(cache)).contents(["activations"])) / 1e6
            gap = float(np.abs(pair[0].test.probabilities - pair[1].test.probabilities).max())
            for name, result in zip(("off", "on"), pair, strict=True):
                told = {"kept_mb": kept * (name == "on"), **row(result), "largest_gap": gap}
                rows.append({"strategy": strategy, "seed": seed, "reuse": name, **told})
    click.echo(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
