"""Does stressed validation reject a model that learned a shortcut, where plain validation prefers it?

    uv run python experiments/planted_shortcuts.py --weights auto --seeds 5 --out shortcuts.csv

Results in LOG.md: "2026-11-25: planted shortcuts", "2026-11-26: planted shortcuts, by the worst stress".

Phantoms, in which a cue marks every PNEUMONIA image of train and validation, and none of test: `aspect` (stretched
sideways by 1.25), `marker` (a bright square in the corner) or `border` (a black frame). Three models are validated on
the planted validation images: `shortcut` (planted training images, default views), `crops` (planted, views `crops-1`)
and `clean` (training images without the cue, default views). The table holds, for each, the plain validation loss, its
mean over the stresses, its worst among them, and the balanced accuracy on test. A rule is right if the model that it
picks is at most 0.02 worse on test than the best of the three.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pandas as pd
from PIL import Image, ImageDraw

from common import trained
from cxr.config import TrainConfig
from cxr.data.load import read_data
from cxr.data.phantoms import write_synthetic
from cxr.machine import ready_machine
from validation import shown

TOLERANCE = 0.02


def stretched(image: Image.Image) -> Image.Image:
    """The middle of the image, stretched sideways by 1.25."""
    width, height = image.size
    margin = round(width * (1 - 1 / 1.25) / 2)
    return image.crop((margin, 0, width - margin, height)).resize((width, height), Image.Resampling.BILINEAR)


def marked(image: Image.Image) -> Image.Image:
    """A bright square in the upper left corner."""
    side = image.size[0]
    ImageDraw.Draw(image).rectangle((side * 0.04, side * 0.04, side * 0.12, side * 0.12), fill=245)
    return image


def framed(image: Image.Image) -> Image.Image:
    """A black frame."""
    side = image.size[0]
    ImageDraw.Draw(image).rectangle((0, 0, side - 1, side - 1), outline=0, width=round(side * 0.04))
    return image


CUES: dict[str, Callable[[Image.Image], Image.Image]] = {"aspect": stretched, "marker": marked, "border": framed}


def plant(clean: Path, folder: Path, cue: str) -> Path:
    """A copy of the phantoms with the cue in every PNEUMONIA image of train and validation."""
    shutil.copytree(clean, folder)
    for path in [*folder.glob("train/PNEUMONIA/*"), *folder.glob("val/PNEUMONIA/*")]:
        CUES[cue](Image.open(path).convert("L")).save(path, quality=95)
    return folder


def row(name: str, config: TrainConfig, judged: TrainConfig) -> dict[str, object]:
    """Train by `config`; validation and test on the images of `judged`."""
    machine = ready_machine(config)
    model, _ = trained(config, read_data(config), machine)
    data = read_data(judged)
    val, test = (shown(judged, data, machine, model, split) for split in ("val", "test"))
    losses = {"plain loss": val["loss plain"], "stressed loss": val["loss stressed"], "worst loss": val["loss worst"]}
    return {"model": name, **losses, "val accuracy": val["accuracy plain"], "test accuracy": test["accuracy plain"]}


def choices(table: pd.DataFrame) -> pd.DataFrame:
    """For each cue and rule: which model it picks, how often, and in how many seeds that is right."""
    rows = []
    for (cue, _), group in table.groupby(["cue", "seed"], sort=False):
        best = group["test accuracy"].max()
        for rule in ("plain loss", "stressed loss", "worst loss"):
            pick = group.loc[group[rule].idxmin()]
            right = pick["test accuracy"] >= best - TOLERANCE
            rows.append({"cue": cue, "rule": rule, pick["model"]: 1, "right": right, "test": pick["test accuracy"]})
    found = pd.DataFrame(rows).fillna(0).groupby(["cue", "rule"], sort=False)
    return pd.concat([found.sum().drop(columns="test"), found["test"].mean().rename("mean test accuracy")], axis=1)


@click.command()
@click.option("--weights", default="auto", show_default=True)
@click.option("--strategy", default="partial", show_default=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--patients", default=200, show_default=True)
@click.option("--image-size", default=128, show_default=True)
@click.option("--epochs", default=8, show_default=True)
@click.option("--views", default=4, show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--out", type=Path, required=True)
def main(seeds: int, patients: int, out: Path, **parameters: str) -> None:
    """Train all models with all cues, and print what each rule picks."""
    config, rows = TrainConfig(**parameters), []  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as work:
        for seed in range(seeds):
            clean = write_synthetic(Path(work) / f"clean-{seed}", seed, patients, patients // 2, config.image_size)
            for cue in CUES:
                root = plant(clean, Path(work) / f"{cue}-{seed}", cue)
                planted = replace(config, seed=seed, data_dir=str(root), cache_dir=work)
                models = {
                    "shortcut": planted,
                    "crops": replace(planted, augment="crops-1"),
                    "clean": replace(planted, data_dir=str(clean)),
                }
                rows += [{"cue": cue, "seed": seed, **row(name, each, planted)} for name, each in models.items()]
                pd.DataFrame(rows).to_csv(out, index=False)
    table = pd.DataFrame(rows)
    click.echo(table.drop(columns="seed").groupby(["cue", "model"], sort=False).mean().round(4).to_string())
    click.echo(choices(table).round(4).to_string())


if __name__ == "__main__":
    main()
