"""The command line. Heavy imports happen inside the commands, so that `cxr --help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click

import cxr
from cxr.config import SYNTHETIC, CompareConfig, CrossvalConfig, TrainCommand, TrainConfig, TuneConfig, configure
from cxr.errors import Stopped, UserError
from cxr.machine import processes
from cxr.options import options

BAD_INPUT, STOPPED = 2, 130
HEAD_START = 20.0  # seconds that the first of several processes has to fail with the same words


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cxr.__version__)
def cli() -> None:
    """Fine-tune a pretrained ResNet to find pneumonia in chest X-rays, and track it in MLflow.

    Not for clinical use.
    """


def _one_process(command: str) -> None:
    if processes() > 1:
        raise UserError(f"torchrun: not for {command}; start it without, or use torchrun for train")


@cli.command()
@options(TrainCommand)
def train(**parameters: Any) -> None:
    """Train one strategy, evaluate its best checkpoint on the test split once, and log everything."""
    command = configure(TrainCommand, parameters)
    from cxr.runs.train import run_with_processes

    run_with_processes(command.train, say=click.echo, run_id=command.resumed)


@cli.command()
@options(TuneConfig)
def tune(**parameters: Any) -> None:
    """Search the learning rate of every phase with Optuna. The same command again continues the study."""
    config = configure(TuneConfig, parameters)
    _one_process("tune")
    from cxr.studies.search import tune_tracked

    tune_tracked(config, say=click.echo)


@cli.command()
@options(CompareConfig)
@click.option("--runs", "first", help="compare these finished runs (ID ID …) and train nothing")
@click.argument("more", nargs=-1, metavar="[ID]...")
def compare(first: str | None, more: tuple[str, ...], **parameters: Any) -> None:
    """Run every strategy with several seeds, and compare them: intervals, paired differences, cost, a verdict."""
    if more and not first:
        raise click.UsageError(f"{' '.join(more)}: name runs after --runs")
    config = configure(CompareConfig, parameters)
    _one_process("compare")
    from cxr.studies.compare import compare_runs, compare_tracked

    if first:
        compare_runs([first, *more], config.margin, say=click.echo)
    else:
        compare_tracked(config, say=click.echo)


@cli.command()
@options(CrossvalConfig)
def crossval(**parameters: Any) -> None:
    """Cross-validate a strategy on the training and validation images, patients kept together; test stays locked."""
    config = configure(CrossvalConfig, parameters)
    _one_process("crossval")
    from cxr.studies.crossval import crossval_tracked

    crossval_tracked(config, say=click.echo)


MODEL = click.option(
    "--model",
    "uri",
    default="models:/cxr-pneumonia@champion",
    show_default=True,
    help="URI of a logged or registered model",
)


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@MODEL
@click.option("--json", "as_json", is_flag=True, help="print JSON, one object for each image")
def predict(images: tuple[Path, ...], uri: str, as_json: bool) -> None:
    """Print label, probability of pneumonia and decision for each of IMAGES. Not for clinical use."""
    from cxr.tracking.registry import load

    table = load(uri).predict_files(images)
    click.echo(table.to_json(orient="records", lines=True) if as_json else table.to_string(index=False))


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@MODEL
@click.option("--out", "folder", type=click.Path(path_type=Path), default="explained", show_default=True, help="folder")
def explain(images: tuple[Path, ...], uri: str, folder: Path) -> None:
    """Write each of IMAGES beside its Grad-CAM heat map into a folder. Not for clinical use."""
    from cxr.serving.explain import explain_files
    from cxr.tracking.registry import load

    for file in explain_files(load(uri), images, folder):
        click.echo(file)


@cli.command("evaluate")
@MODEL
@click.option("--data-dir", required=True, help="Kaggle-shaped folder (its test split), or flat NORMAL/ and PNEUMONIA/")
@click.option(
    "--bootstrap",
    type=click.IntRange(0, 100000),
    default=1000,
    show_default=True,
    help="resamples behind each 95% interval",
)
@click.option("--cache-dir", default="auto", show_default=True, help="where decoded images are kept")
def evaluate_command(uri: str, data_dir: str, bootstrap: int, cache_dir: str) -> None:
    """Evaluate a model on other images, as an MLflow run of its own."""
    from cxr.runs.evaluate import evaluate_tracked

    evaluate_tracked(uri, data_dir, bootstrap, cache_dir, say=click.echo)


@cli.group()
def models() -> None:
    """List, promote and export registered models."""


NAME = click.option("--name", default="cxr-pneumonia", show_default=True, help="registered model")


@models.command("list")
@NAME
def list_command(name: str) -> None:
    """Show the versions, newest first."""
    from cxr.tracking.registry import versions

    click.echo(versions(name).to_string(index=False))


@models.command("promote")
@click.argument("version")
@NAME
def promote_command(version: str, name: str) -> None:
    """Make VERSION the champion, whatever its figures; who was champion before is kept as a tag."""
    from cxr.tracking.registry import promote

    click.echo(promote(name, version))


@models.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@MODEL
@click.option("--onnx", is_flag=True, help="write X_ray_classifier.onnx, too")
def export_command(folder: Path, uri: str, onnx: bool) -> None:
    """Write X_ray_classifier.pth (a torchvision state dict), class_to_index.json and model.json into FOLDER."""
    from cxr.tracking.registry import load

    for file in load(uri).export(folder, onnx):
        click.echo(file)


@models.command("verify")
@click.argument("target")
@click.option("--data-dir", help="where the images are now, if not where the run had them")
@click.option("--cache-dir", help="where decoded images are kept, if not where the run had them")
def verify_command(target: str, data_dir: str | None, cache_dir: str | None) -> None:
    """Compute the figures of TARGET (a run's id, or a model's URI) again, from its predictions, model and data.

    Exit code 1 when anything differs.
    """
    from cxr.runs.verify import verify

    findings = verify(target, data_dir, cache_dir)
    for finding in findings:
        click.echo(finding.line())
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


@cli.group()
def data() -> None:
    """Look at data, make phantoms, download the Kaggle set."""


@data.command("audit")
@click.argument("folder", default=SYNTHETIC)
@click.option("--cache-dir", default="auto", show_default=True, help="where decoded images are kept")
@click.option(
    "--weights", default="none", show_default=True, help="look for shifts with these weights, as in train; none"
)
@click.option("--strict", is_flag=True, help="leakage across splits ends with exit code 2")
def audit_command(folder: str, cache_dir: str, weights: str, strict: bool) -> None:
    """Say what FOLDER holds and what is wrong with it. Exit code 1 when files are corrupt."""
    config = TrainConfig(data_dir=folder, cache_dir=cache_dir, on_bad_image="skip", strict=strict)
    from cxr.data.load import read_data
    from cxr.network.resnet import build_model
    from cxr.runs.audit import audited

    content = read_data(config)
    model = None if weights == "none" else build_model(config.arch, weights, config.seed)[0]
    for finding in audited(config, content, model):
        click.echo(finding.line())
    sys.exit(1 if content.bad else 0)


@data.command("cache")
@click.option(
    "--prune",
    "days",
    type=click.FloatRange(0),
    help="remove what was not used for so many days; an interrupted run whose checkpoints go cannot go on",
)
@click.option("--cache-dir", default="auto", show_default=True, help="the cache folder")
def cache_command(days: float | None, cache_dir: str) -> None:
    """List what the cache holds (decoded images, activations, checkpoints), the least recently used first."""
    from cxr.storage import Cache

    cache = Cache.open(cache_dir)
    removed = cache.prune(days) if days is not None else []
    for kept in removed:
        click.echo(f"removed {kept.line()}")
    for kept in cache.contents():
        click.echo(kept.line())
    click.echo(f"{sum(kept.size for kept in cache.contents()) / 1e9:.2f} GB in {cache.root}")


@data.command("fetch")
def fetch_command() -> None:
    """Download the Kaggle data set (about 2 GB) and print the folder to give as --data-dir."""
    from cxr.data.fetch import fetch

    click.echo(fetch())


@data.command("synth")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="another seed draws other children")
def synth_command(folder: Path, seed: int) -> None:
    """Write the phantom X-rays into FOLDER/chest_xray."""
    from cxr.data.phantoms import write_synthetic

    try:
        click.echo(write_synthetic(folder, seed=seed))
    except (OSError, ValueError) as error:
        raise UserError(f"cxr data synth {folder}: {error}; name another folder") from error


def main() -> None:
    """Run the command line: bad input ends with one line and exit code 2, Ctrl-C and SIGTERM with 130."""
    warnings.showwarning = _show_warning
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.ClickException, UserError) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        number = os.environ["RANK"] if processes() > 1 else "0"
        if number != "0":
            _let_the_first_speak()
        click.echo(f"error: {reason}" if number == "0" else f"process {number}: {reason}", err=True)
        _note_on_run(reason)
        sys.exit(BAD_INPUT)
    except (click.Abort, KeyboardInterrupt, Stopped):
        click.echo("stopped", err=True)
        sys.exit(STOPPED)


def _let_the_first_speak() -> None:
    """Wait before failing: torchrun kills all processes when one fails, and mostly each would say the same."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM already: it ends this process without a word
    time.sleep(HEAD_START)


def _note_on_run(reason: str) -> None:
    """Under `mlflow run`, tell the run that it opened why the command failed."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        from cxr.tracking.lifecycle import note_error

        note_error(run_id, reason)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    # MLflow insists on showing its advice on type hints, filters or not; ours would have to be a lie.
    if category is UserWarning and "type hint" not in str(message):
        click.echo(f"warning: {message}", err=True)
