"""The command line. Heavy packages are imported inside the commands, so that `cxr --help` is fast."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

import cxr
from cxr.config import (
    SYNTHETIC,
    CompareConfig,
    CrossvalConfig,
    FamilyConfig,
    ServeConfig,
    TrainCommand,
    TrainConfig,
    TuneConfig,
    configure,
)
from cxr.errors import Stopped, UserError, disk_full
from cxr.machine import processes
from cxr.options import options
from cxr.parameters import option_name
from cxr.storage import own_temporary_files
from cxr.terminal import show
from cxr.warning_lines import show_warnings_as_lines

BAD_INPUT, STOPPED = 2, 130
ERROR_DELAY = 20.0  # seconds that other processes wait, so that process 0 can report the same error first


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cxr.__version__)
def cli() -> None:
    """Fine-tune a pretrained network to find pneumonia in chest X-rays, and track it in MLflow.

    Not for clinical use.
    """


def _one_process(command: str) -> None:
    if processes() > 1:
        raise UserError(f"torchrun: not supported by {command}, only by train; start {command} without torchrun")


def _warm_up(config: FamilyConfig) -> None:
    """Have the libraries loaded for other processes, if there will be any, while they are loaded here."""
    if config.engine == "local" and config.jobs not in ("auto", "1"):
        from cxr.studies.worker import warm_up

        warm_up(config.train.threads)


@cli.command()
@options(TrainCommand)
def train(**parameters: Any) -> None:
    """Train one strategy, evaluate its best checkpoint on the test split once, and log everything."""
    command = configure(TrainCommand, parameters)
    from cxr.runs.train import run_with_processes

    run_with_processes(command.train, say=show, run_id=command.resumed)


@cli.command()
@options(TuneConfig)
def tune(**parameters: Any) -> None:
    """Search the learning rate of every phase with Optuna. Repeating the command continues the study."""
    config = configure(TuneConfig, parameters)
    _one_process("tune")
    from cxr.studies.search import tune_tracked

    tune_tracked(config, say=show)


@cli.command()
@options(CompareConfig)
@click.option("--runs", "first", help="compare these finished runs (ID ID …) without training")
@click.argument("more", nargs=-1, metavar="[ID]...")
def compare(first: str | None, more: tuple[str, ...], **parameters: Any) -> None:
    """Train every strategy with several seeds and compare them: intervals, paired differences, cost, a verdict."""
    if more and not first:
        raise click.UsageError(f"{' '.join(more)}: run ids must follow --runs")
    config = configure(CompareConfig, parameters)
    _one_process("compare")
    if not first:
        _warm_up(config)
    from cxr.studies.compare import compare_runs, compare_tracked

    if first:
        compare_runs([first, *more], config.margin, say=show)
    else:
        compare_tracked(config, say=show)


@cli.command()
@options(CrossvalConfig)
def crossval(**parameters: Any) -> None:
    """Cross-validate a strategy on the training and validation images, by patient. The test split is not used."""
    config = configure(CrossvalConfig, parameters)
    _one_process("crossval")
    _warm_up(config)
    from cxr.studies.crossval import crossval_tracked

    crossval_tracked(config, say=show)


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
@click.option("--json", "as_json", is_flag=True, help="print one JSON object per image")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="write a CSV, with unreadable images in its last column",
)
def predict(images: tuple[Path, ...], uri: str, as_json: bool, out: Path | None) -> None:
    """Print label, probability and decision for each of IMAGES: files, folders and lists. Not for clinical use.

    With --out, unreadable images do not stop the others; the exit code is 1 if there are any.
    """
    from cxr.serving.bulk import image_files, write_predictions
    from cxr.tracking.registry import load

    files = image_files(images)
    if out is None:
        table = load(uri).predict_files(files)
        click.echo(table.to_json(orient="records", lines=True) if as_json else table.to_string(index=False))
        return
    if as_json:
        raise UserError("--json and --out cannot be combined")
    count, bad = write_predictions(load(uri), files, out)
    for image, reason in bad:
        click.echo(f"unreadable: {image} ({reason})", err=True)
    click.echo(f"{count} of {len(files)} images predicted, {len(bad)} unreadable: {out}")
    sys.exit(1 if bad else 0)


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@MODEL
@click.option(
    "--out", "folder", type=click.Path(path_type=Path), default="explained", show_default=True, help="output folder"
)
def explain(images: tuple[Path, ...], uri: str, folder: Path) -> None:
    """For each of IMAGES, save a picture of the image next to its Grad-CAM heat map. Not for clinical use."""
    from cxr.serving.explain import explain_files
    from cxr.tracking.registry import load

    for file in explain_files(load(uri), images, folder):
        click.echo(file)


@cli.command("demo")
@MODEL
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="address to listen on; the default is this machine"
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="port to listen on; 0 takes a free one",
)
def demo_command(uri: str, host: str, port: int) -> None:
    """Serve a page on which to drop films and see what a model makes of them. Not for clinical use.

    No film is kept or leaves this machine. Versions of the same registered model can be chosen on the page.
    """
    try:
        from cxr.serving.demo import Models, serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"demo: the package {error.name} is not installed; `uv run --extra demo cxr demo` brings it"
        ) from error
    from cxr.tracking.registry import choices, load

    serve(Models(lambda: choices(uri), load), host, port, say=show)


@cli.command("evaluate")
@MODEL
@click.option(
    "--data-dir",
    required=True,
    help="folder with train/ and test/ (evaluates its test split), or of class folders, or a list (CSV, TSV, JSON); or "
    "a folder of images without labels, for which the accuracy is estimated",
)
@options(TrainCommand, ("labels", "columns", "patient_pattern", "paths", "bootstrap", "cache_dir"))
def evaluate_command(uri: str, **parameters: Any) -> None:
    """Evaluate a model on other images and log the result as a new MLflow run."""
    config = TrainConfig(**parameters)
    from cxr.runs.evaluate import evaluate_tracked

    evaluate_tracked(uri, config, say=show)


@cli.group()
def models() -> None:
    """List, promote, export and verify models."""


NAME = click.option("--name", default="cxr-pneumonia", show_default=True, help="registered model")


@models.command("list")
@NAME
def list_command(name: str) -> None:
    """List the versions of a registered model, newest first."""
    from cxr.tracking.registry import versions

    click.echo(versions(name).to_string(index=False))


@models.command("promote")
@click.argument("version")
@NAME
def promote_command(version: str, name: str) -> None:
    """Make VERSION the champion regardless of its metrics; the previous champion is recorded in a tag."""
    from cxr.tracking.registry import promote

    click.echo(promote(name, version))


@models.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@MODEL
@click.option("--onnx", is_flag=True, help="also write X_ray_classifier.onnx")
def export_command(folder: Path, uri: str, onnx: bool) -> None:
    """Write X_ray_classifier.pth (a torchvision state dict), class_to_index.json and model.json into FOLDER.

    MODEL_CARD.md, beside them, tells what the model is for and how well it does.
    """
    from cxr.tracking.cards import write_card
    from cxr.tracking.registry import load

    predictor = load(uri)
    for file in (*predictor.export(folder, onnx), write_card(uri, predictor.card, folder)):
        click.echo(file)


@models.command("ensemble")
@click.argument("runs", nargs=-1, required=True)
@click.option("--name", default="cxr-pneumonia", show_default=True, help="registered model, or none")
@click.option("--data-dir", help="folder of the images, if they were moved since the runs")
@click.option("--cache-dir", help="cache folder, if it was moved since the runs")
def ensemble_command(runs: tuple[str, ...], name: str, data_dir: str | None, cache_dir: str | None) -> None:
    """Combine finished RUNS into one model: mean probabilities, calibrated on validation as a whole, registered."""
    from cxr.runs.ensemble import ensemble_tracked

    ensemble_tracked(runs, name, data_dir, cache_dir, show)


@models.command("serve")
@MODEL
@options(ServeConfig)
def serve_command(uri: str, **parameters: Any) -> None:
    """Answer requests over HTTP, in the form of `mlflow models serve`, within limits. Not for clinical use.

    SIGTERM and Ctrl-C end it once the requests that have begun are answered.
    """
    config = ServeConfig(**parameters)
    from cxr.serving.server import serve
    from cxr.tracking.registry import downloaded, read_package

    package = downloaded(uri)
    read_package(package, uri)
    serve(package, config, show)


@models.command("verify")
@click.argument("target")
@click.option("--data-dir", help="folder of the images, if they were moved since the run")
@click.option("--cache-dir", help="cache folder, if it was moved since the run")
def verify_command(target: str, data_dir: str | None, cache_dir: str | None) -> None:
    """Recompute the metrics of TARGET (a run ID or a model URI) from its predictions, model and data.

    Exit code 1 if any of them differs from what was logged.
    """
    from cxr.runs.verify import verify

    findings = verify(target, data_dir, cache_dir)
    for finding in findings:
        click.echo(finding.line())
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


@cli.group()
def data() -> None:
    """Audit a data set, manage the cache, generate phantoms, download the Kaggle set."""


# What decides how a source of images is read.
SOURCE = (
    *("labels", "classes", "positive", "columns", "patient_pattern", "splits", "test_fraction"),
    *("val_split", "val_fraction", "split_seed", "paths", "cache_dir"),
)


@data.command("check")
@click.argument("source", default=SYNTHETIC)
@options(TrainCommand, SOURCE)
def check_command(source: str, **parameters: Any) -> None:
    """Print what would be read from SOURCE (a folder or a list), what is odd about it, and how to train on it.

    No image is decoded, and nothing is written but the phantoms, if they are asked for.
    """
    config = TrainConfig(data_dir=source, **parameters)
    from cxr.data.check import checked
    from cxr.data.load import source_of

    for line in checked(source_of(config), config):
        click.echo(line)
    default = TrainConfig()
    given = [(name, value) for name, value in parameters.items() if value != getattr(default, name)]
    extra = [part for name, value in given for part in (option_name(name), str(value))]
    click.echo(f"train: {shlex.join(['cxr', 'train', '--data-dir', source, *extra])}")


@data.command("audit")
@click.argument("folder", default=SYNTHETIC)
@options(TrainCommand, SOURCE)
@click.option(
    "--weights",
    default="none",
    show_default=True,
    help="also test for a shift between splits, in features from these weights (values as in train); none skips it",
)
@click.option("--strict", is_flag=True, help="exit with code 2 if there is leakage across splits")
def audit_command(folder: str, weights: str, strict: bool, **parameters: Any) -> None:
    """Report the contents of FOLDER (or list) and any problems found. Exit code 1 if files are corrupt."""
    config = TrainConfig(data_dir=folder, on_bad_image="skip", strict=strict, **parameters)
    from cxr.data.load import read_data
    from cxr.runs.audit import audited

    content = read_data(config)
    model = None if weights == "none" else _network(config, weights, len(content.task.classes))
    for finding in audited(config, content, model):
        click.echo(finding.line())
    sys.exit(1 if content.bad else 0)


def _network(config: TrainConfig, weights: str, classes: int) -> Any:
    from cxr.network.resnet import build_model

    return build_model(config.arch, weights, config.seed, classes, config.image_size)[0]


@data.command("cache")
@click.option(
    "--prune",
    "days",
    type=click.FloatRange(0),
    help="remove entries not used for this many days; interrupted runs cannot be resumed once pruned",
)
@click.option("--cache-dir", default="auto", show_default=True, help="cache folder")
def cache_command(days: float | None, cache_dir: str) -> None:
    """List the entries of the cache (decoded images, activations, checkpoints), least recently used first."""
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
    """Download the Kaggle data set (about 2 GB) and print the folder to pass as --data-dir."""
    from cxr.data.fetch import fetch

    click.echo(fetch())


@data.command("synth")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="a different seed generates different patients"
)
def synth_command(folder: Path, seed: int) -> None:
    """Generate synthetic X-rays (phantoms) in FOLDER/chest_xray."""
    from cxr.data.phantoms import write_synthetic

    try:
        click.echo(write_synthetic(folder, seed=seed))
    except (OSError, ValueError) as error:
        raise UserError(f"cxr data synth {folder}: {error}; choose another folder") from error


def main() -> None:
    """Run the command line. Invalid input prints one line and exits with code 2; Ctrl-C and SIGTERM exit with 130."""
    show_warnings_as_lines()
    try:
        with own_temporary_files():
            cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.ClickException, UserError) as error:
        _fail(error.format_message() if isinstance(error, click.ClickException) else str(error))
    except OSError as error:
        if (full := disk_full(error)) is None:
            raise
        _fail(f"{full}; free space there, and give the command again")
    except (click.Abort, KeyboardInterrupt, Stopped):
        click.echo("stopped", err=True)
        sys.exit(STOPPED)


def _fail(reason: str) -> NoReturn:
    """Print the reason as one line, record it on the run that `mlflow run` opened, and exit."""
    number = os.environ["RANK"] if processes() > 1 else "0"
    if number != "0":
        _wait_for_process_zero()
    click.echo(f"error: {reason}" if number == "0" else f"process {number}: {reason}", err=True)
    _record_on_run(reason)
    sys.exit(BAD_INPUT)


def _wait_for_process_zero() -> None:
    """Wait before failing: torchrun kills all processes when one fails, and usually all report the same error."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # like SIGTERM: ends this process silently
    time.sleep(ERROR_DELAY)


def _record_on_run(reason: str) -> None:
    """Under `mlflow run`, record the reason for the failure on the run that MLflow created."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        from cxr.tracking.lifecycle import note_error

        note_error(run_id, reason)
