"""Prediction of a folder of films against the network alone: images/s, memory, and what corrupt files do.

    uv run python experiments/bench_predict.py --data-dir FOLDER --model models:/cxr-pneumonia@champion

Result in LOG.md: "2026-11-26: prediction in bulk".

The bare rate is that of the packaged network (with the start weights that tell how familiar an image is) on one batch
in memory, again and again. `cxr predict FOLDER --out FILE` is run in this process on copies of the folder's files, ten
of them cut off in the middle; the resident memory is read after each tenth of the images.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pandas as pd
import psutil

from cxr.machine import keep_freed_memory
from cxr.serving.bulk import image_files, predicted, write_predictions
from cxr.serving.predictor import Predictor
from cxr.tracking.registry import load

BAD = 10
SECONDS = 10.0


def bare(predictor: Predictor, file: Path) -> float:
    """Images/s of the network alone: the median over batches of 32."""
    images, seconds = [predictor.prepare(file.read_bytes())] * 32, []
    predictor.predict(images)
    while sum(seconds) < SECONDS:
        started = time.perf_counter()
        predictor.predict(images)
        seconds.append(time.perf_counter() - started)
    return 32 / statistics.median(seconds)


def memory_over_time(predictor: Predictor, files: list[Path]) -> list[float]:
    """The resident memory in MB after each tenth of the images."""
    process, found, marks = psutil.Process(), [], np.linspace(0, len(files), 11)[1:]
    done = 0
    for table in predicted(predictor, files):
        done += len(table)
        while len(found) < len(marks) and done >= marks[len(found)]:
            found.append(process.memory_info().rss / 1e6)
    return found


@click.command()
@click.option("--data-dir", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="models:/cxr-pneumonia@champion", show_default=True)
def main(data_dir: Path, model: str) -> None:
    """Run everything and print it."""
    keep_freed_memory()
    predictor = load(model)
    with tempfile.TemporaryDirectory() as work:
        films = Path(work) / "films"
        shutil.copytree(data_dir, films)
        files = image_files([films])
        chosen = files[:: len(files) // BAD][:BAD]
        for file in chosen:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
        rate, started = bare(predictor, files[1]), time.perf_counter()
        count, bad = write_predictions(predictor, files, Path(work) / "out.csv")
        ours = len(files) / (time.perf_counter() - started)
        rows = len(pd.read_csv(Path(work) / "out.csv"))
        named = {path for path, _ in bad} == {str(file) for file in chosen}
        click.echo(f"network alone {rate:.1f} images/s, {len(files)} files {ours:.1f} images/s: {ours / rate:.0%}")
        click.echo(f"{count} predicted, {len(bad)} unreadable, the cut ones: {named}; {rows} rows")
        memory = memory_over_time(predictor, files)
        click.echo("memory in MB after each tenth: " + ", ".join(f"{each:.0f}" for each in memory))


if __name__ == "__main__":
    main()
