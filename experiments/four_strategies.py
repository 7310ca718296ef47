"""The four strategies with one seed each, on one data set from one set of weights.

    uv run python experiments/four_strategies.py --data-dir FOLDER --weights FILE --precision bf16

Result in LOG.md: "2026-11-21: four strategies, one seed, real X-rays".
"""

from __future__ import annotations

from dataclasses import replace

import click

from cxr.config import TrainConfig
from cxr.runs.train import run_tracked

# On a CPU an epoch of `full` takes 1.5 to 6 minutes, so its phases are kept short here.
EPOCHS = {"frozen": 10, "partial": 10, "full": 3, "gradual": 2}


def configs(data_dir: str, weights: str) -> list[TrainConfig]:
    """One configuration for each strategy, the cheap ones first."""
    base = TrainConfig(data_dir=data_dir, weights=weights)
    return [replace(base, strategy=strategy, epochs=epochs) for strategy, epochs in EPOCHS.items()]


@click.command()
@click.option("--data-dir", default="synthetic", show_default=True)
@click.option("--weights", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
def main(data_dir: str, weights: str, precision: str) -> None:
    """Train them one after the other, each as an MLflow run."""
    for config in configs(data_dir, weights):
        run_tracked(replace(config, precision=precision), say=click.echo)


if __name__ == "__main__":
    main()
