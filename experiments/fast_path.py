"""Whether the fast path changes results: the same configuration and seeds with and without reuse, side by side.

    uv run python experiments/fast_path.py --data-dir FOLDER --strategies frozen,partial --epochs 2 --seeds 2

With reuse, what the frozen prefix gives is computed once for each view and looked up; without, it is computed in every
epoch. Prints validation loss, test ROC-AUC and accuracy of both, the largest difference between their test
probabilities (0 is expected), and the training seconds.
"""

from __future__ import annotations

import tempfile

import click
import numpy as np
import pandas as pd

from cxr.config import TrainConfig
from cxr.pipeline import run
from cxr.results import RunResult
from cxr.tracking import NullTracker


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
@click.option("--epochs", default=2, show_default=True)
@click.option("--seeds", default=1, show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--image-size", default=224, show_default=True)
def main(
    data_dir: str, weights: str, strategies: str, epochs: int, seeds: int, precision: str, image_size: int
) -> None:
    """Run every configuration twice and print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for strategy in strategies.split(","):
            for seed in range(seeds):
                pair = [
                    one(
                        TrainConfig(
                            strategy=strategy,
                            seed=seed,
                            data_dir=data_dir,
                            weights=weights,
                            epochs=epochs,
                            precision=precision,
                            image_size=image_size,
                            reuse_gb=reuse,
                            bootstrap=0,
                            cache_dir=cache,
                        )
                    )
                    for reuse in (0.0, 4.0)
                ]
                gap = float(np.abs(pair[0].test.probabilities - pair[1].test.probabilities).max())
                for name, result in zip(("off", "on"), pair, strict=True):
                    rows.append({"strategy": strategy, "seed": seed, "reuse": name, **row(result), "largest_gap": gap})
    click.echo(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
