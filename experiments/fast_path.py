"""Does the fast path change results? The same configurations and seeds with and without reuse of activations.

    uv run python experiments/fast_path.py --data-dir FOLDER --strategies frozen,partial --epochs 4 --seeds 2

Result in LOG.md: "2026-11-22: speed on a CPU, compared with a notebook loop, Lightning and timm", Accuracy.

With reuse, the output of the frozen prefix is computed once for each view and then looked up; without, it is computed
in every epoch. Use more epochs than there are views (three): with fewer, storing does not pay and is not done. The
table holds how much was stored, validation loss, test ROC-AUC and accuracy of both, the largest difference between
their test probabilities (0 is expected), and the training seconds.
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
    """Train and test once, without tracking."""
    return run(config, NullTracker(), lambda line: None)


def row(result: RunResult) -> dict[str, float]:
    """The results to compare."""
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
                values = {"kept_mb": kept * (name == "on"), **row(result), "largest_gap": gap}
                rows.append({"strategy": strategy, "seed": seed, "reuse": name, **values})
    click.echo(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
