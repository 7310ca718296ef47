"""Which images does a registered model call unfamiliar, of its own splits and of images that do not belong?

    uv run python experiments/check_familiarity.py --model models:/cxr-pneumonia@champion --data-dir FOLDER

Result in LOG.md: "2026-11-26: four strategies x five seeds with what validation chose".

An image is flagged if at most 5% of the validation images are as unfamiliar. Images that do not belong are made of
validation images (inverted, turned by 90 degrees, halves), phantoms, crops of photographs, and any other files.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pandas as pd

from choose_familiarity import of_split, strangers
from cxr.config import TrainConfig
from cxr.data.load import read_data
from cxr.evaluation.report import UNFAMILIAR
from cxr.tracking.registry import load


@click.command()
@click.option("--model", "uri", default="models:/cxr-pneumonia@champion", show_default=True)
@click.option("--data-dir", required=True)
@click.argument("others", nargs=-1, type=click.Path(path_type=Path))
def main(uri: str, data_dir: str, others: tuple[Path, ...]) -> None:
    """Print the share that is flagged of each kind."""
    predictor = load(uri)
    card = predictor.card
    data = read_data(TrainConfig(data_dir=data_dir, image_size=card.image_size, resize=card.resize))
    kinds = {name: of_split(data, name) for name in ("val", "test")}
    kinds |= strangers(kinds["val"], card.image_size)
    if others:
        kinds["other files"] = np.stack(predictor.read_files(others))
    rows = []
    for kind, images in kinds.items():
        found = predictor.predict(list(images))
        flagged, abstained = (found["familiarity"] < UNFAMILIAR).mean(), found["abstain"].mean()
        rows.append({"images": kind, "count": len(images), "unfamiliar": flagged, "abstained": abstained})
    click.echo(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
