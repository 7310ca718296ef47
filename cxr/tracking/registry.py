"""The best model as an MLflow LoggedModel and registry version: safetensors, a card and the code; no pickle.

Alias `candidate` is the latest version; `champion` moves only to one that is better on the same validation images.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError

import cxr
from cxr.errors import UserError
from cxr.network.weights import StateDict
from cxr.serving.choice import Choice
from cxr.serving.familiar import Familiar
from cxr.serving.predictor import CARD, ModelCard, Predictor, save_package
from cxr.tracking.descriptions import describe_model
from cxr.tracking.outage import waits
from cxr.tracking.reading import LoggedRun
from cxr.tracking.store import one_at_a_time, prepare, store_errors

CANDIDATE, CHAMPION, BEFORE = "candidate", "champion", "champion_before"
REQUIREMENTS = (
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "pydicom",
    "safetensors",
    "scikit-learn",
    "torch",
    "torchvision",
    "tqdm",
)


def requirements() -> list[str]:
    """What a logged model needs, pinned to what is installed: MLflow's inference of it takes seconds and a network."""
    return [f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS]


@waits
def log_model(state: StateDict, card: ModelCard, example: bytes, familiar: Familiar | None = None) -> str:
    """Log the model into the active run and return its id. `example` is an encoded image.

    One that an interrupted attempt at the same run has logged is the same, and is taken.
    """
    import mlflow

    run = mlflow.active_run()
    assert run is not None
    if earlier := _logged_earlier(run.info.experiment_id, run.info.run_id):
        return earlier
    source = Path(cxr.__file__).parent
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        # The signature is given; a type hint that allows bytes, text and arrays is none that MLflow could use.
        warnings.filterwarnings("ignore", "(?s).*ype hint", UserWarning)
        package = Path(work) / "package"
        save_package(package, state, card, familiar)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(source / "serving" / "pyfunc_model.py"),
            artifacts={"package": str(package)},
            code_paths=[str(source)],
            pip_requirements=requirements(),
            signature=_signature(card, familiar is not None),
            input_example=pd.DataFrame({"image": [base64.b64encode(example).decode()]}),
            metadata={"class_to_index": card.class_to_index, "strategy": card.strategy, "arch": card.arch},
        )
    return str(info.model_id)


def logged_models(experiment_id: str, run_id: str) -> list[Any]:
    """The models that a run logged, half-logged ones among them."""
    import mlflow

    chosen = f"source_run_id = '{run_id}'"
    found: list[Any] = mlflow.search_logged_models([experiment_id], chosen, output_format="list")
    return found


def model_of(run: LoggedRun) -> str:
    """The ID of the model that a run logged. Raises `UserError` if there is none."""
    found = logged_models(run.experiment_id, run.run_id)
    if not found:
        raise UserError(f"run {run.run_id} has no logged model; it is not a finished training run")
    return str(found[0].model_id)


def _logged_earlier(experiment_id: str, run_id: str) -> str | None:
    """The id of the run's model, if it was logged to the end; half-logged ones are deleted."""
    import mlflow

    for model in logged_models(experiment_id, run_id):
        if model.status == "READY":
            return str(model.model_id)
        mlflow.MlflowClient().delete_logged_model(model.model_id)
    return None


def _signature(card: ModelCard, selective: bool) -> Any:
    """`image` is of any type, because bytes, base64 text and arrays are all taken."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    anything = AnyType()  # type: ignore[no-untyped-call]
    inputs = Schema([ColSpec(anything)])  # unnamed, so that a list will do as well as a table
    outputs: list[ColSpec | TensorSpec] = [ColSpec(kind, name) for name, kind in card.answers(selective).items()]
    return ModelSignature(inputs=inputs, outputs=Schema(outputs))


class DataKind(StrEnum):
    """What a model was trained on; the values are those of a run's tag `data`."""

    PHANTOMS = "synthetic phantoms"
    XRAYS = "X-rays"

    @classmethod
    def of(cls, synthetic: bool) -> DataKind:
        """The kind of a data set."""
        return cls.PHANTOMS if synthetic else cls.XRAYS

    @property
    def version_tag(self) -> str:
        """The tag `data` of a registered version."""
        return f"{self} (NOT real X-rays)" if self is DataKind.PHANTOMS else str(self)

    @classmethod
    def of_version(cls, tags: Mapping[str, str]) -> DataKind | None:
        """The kind in a version's tags; None if it is missing."""
        return next((kind for kind in cls if tags.get("data") == kind.version_tag), None)


@dataclass(frozen=True, slots=True)
class Registration:
    """The registered version, whether it is now champion, and the reason."""

    name: str
    version: str
    champion: bool
    why: str

    def line(self) -> str:
        """One line for the summary."""
        return f"registered as {self.name} version {self.version} (candidate); {self.why}"


@waits
def register(model_id: str, name: str, tags: Mapping[str, str]) -> Registration:
    """Register a logged model as a version of `name`, and make it champion if it is better.

    `tags` must hold `val_fingerprint` and the metric that `selected_by` names (default `val_loss`): only versions
    validated on the same images, and trained on views of the same recipe if both say so (`augment`), are compared.
    """
    import mlflow

    client = mlflow.MlflowClient()
    with one_at_a_time():  # or two that end together could each replace the champion, the worse one last
        registered = client.search_model_versions(f"name = '{name}'")
        earlier = [v for v in registered if v.source == f"models:/{model_id}"]
        made = earlier[0] if earlier else _new_version(model_id, name, tags)
        client.set_registered_model_alias(name, CANDIDATE, made.version)
        champion = _by_alias(name, CHAMPION)
        better, why = _is_better(tags, champion)
        if better:
            _make_champion(name, str(made.version))
    return Registration(name, str(made.version), better, why)


def _new_version(model_id: str, name: str, tags: Mapping[str, str]) -> Any:
    import mlflow

    with redirect_stderr(io.StringIO()):  # `Created version '2'`, which our own line says
        return mlflow.register_model(f"models:/{model_id}", name, tags=dict(tags))


def _by_alias(name: str, alias: str) -> Any | None:
    """The version that an alias points to, or None."""
    import mlflow

    client = mlflow.MlflowClient()
    number = client.get_registered_model(name).aliases.get(alias)
    return client.get_model_version(name, str(number)) if number else None


def _is_better(tags: Mapping[str, str], champion: Any | None) -> tuple[bool, str]:
    if champion is None:
        return True, "champion (first version)"
    if champion.tags.get("run_id") == tags["run_id"]:
        return True, "champion"
    before = f"version {champion.version}"
    if champion.tags.get("class_to_index", tags.get("class_to_index")) != tags.get("class_to_index"):
        return False, f"{before} remains champion: it has other classes; give --register another name"
    seen = [DataKind.of_version(each) for each in (champion.tags, tags)]
    if seen[0] is DataKind.PHANTOMS and seen[1] is not DataKind.PHANTOMS:
        return True, f"champion: {before} was trained on phantoms only"
    if champion.tags.get("val_fingerprint") != tags["val_fingerprint"]:
        return False, f"{before} remains champion: validated on different images, so they cannot be compared"
    views = [each.get("augment") for each in (champion.tags, tags)]
    if None not in views and views[0] != views[1]:
        return (
            False,
            f"{before} remains champion: it was trained with augment={views[0]}, not {views[1]}, and validation, which "
            "shares the cues of training, prefers weaker views; see `cxr models promote`",
        )
    name = tags.get("selected_by", "val_loss")
    under = [each.get("stresses", "stresses-1") for each in (champion.tags, tags)]
    if name == "stressed_val_loss" and under[0] != under[1]:
        return (
            False,
            f"{before} remains champion: its {name} is of {under[0]}, not {under[1]}; see `cxr models promote`",
        )
    if name not in champion.tags:
        return False, f"{before} remains champion: it has no {name} to compare"
    mine, theirs = float(tags[name]), float(champion.tags[name])
    if mine < theirs:
        return True, f"champion: {name} {mine:.4f}, lower than {theirs:.4f} of {before}"
    return False, f"{before} remains champion: its {name} {theirs:.4f} is not higher than {mine:.4f}"


def promote(name: str, number: str) -> str:
    """Make a version champion; its predecessor is kept as tag `champion_before`. Returns a summary line.

    The registered model gets the model card of the version as its description.
    """
    import mlflow

    with _registry_errors(f"{name} version {number}"), one_at_a_time():
        mlflow.MlflowClient().get_model_version(name, number)
        before = _make_champion(name, number)
        describe_model(name)
    return f"{name}: champion is version {number}" + (f", previously version {before.version}" if before else "")


def _make_champion(name: str, number: str) -> Any | None:
    """Move the alias; returns the version that it pointed to, or None."""
    import mlflow

    client, before = mlflow.MlflowClient(), _by_alias(name, CHAMPION)
    if before is not None and str(before.version) != number:
        client.set_model_version_tag(name, number, BEFORE, str(before.version))
    client.set_registered_model_alias(name, CHAMPION, number)
    return before


def registered_as(uri: str) -> tuple[str, str] | None:
    """(name, version) of the registered model that a URI names by version or alias; None for other URIs.

    Raises `UserError` when there is no such version.
    """
    import mlflow

    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if match is None or match[2]:
        return (match[1], match[2]) if match else None
    with _registry_errors(uri):
        return match[1], str(mlflow.MlflowClient().get_model_version_by_alias(match[1], match[3]).version)


def versions(name: str) -> pd.DataFrame:
    """The versions of a registered model, newest first: version, aliases, strategy, val_loss, champion_before, run."""
    import mlflow

    with _registry_errors(name):
        client = mlflow.MlflowClient()
        aliases = client.get_registered_model(name).aliases
        found = client.search_model_versions(f"name = '{name}'")
    rows = [
        {
            "version": int(v.version),
            "aliases": ",".join(sorted(alias for alias, number in aliases.items() if int(number) == int(v.version))),
            **{key: v.tags.get(key, "") for key in ("strategy", "val_loss", BEFORE)},
            "run": v.run_id,
        }
        for v in found
    ]
    columns = ["version", "aliases", "strategy", "val_loss", BEFORE, "run"]
    return pd.DataFrame(rows, columns=columns).sort_values("version", ascending=False)


def choices(uri: str) -> list[Choice]:
    """The model of that URI and, if it is registered, the other versions, newest first.

    Raises `UserError` when there is no such version.
    """
    import mlflow

    named = registered_as(uri)
    if named is None:
        return [Choice(uri, uri)]
    name, chosen = named
    with _registry_errors(name):
        client = mlflow.MlflowClient()
        aliases = client.get_registered_model(name).aliases
        found = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda each: -int(each.version))
    first = [each for each in found if str(each.version) == chosen]
    if not first:
        raise UserError(f"{uri}: no such version; `cxr models list --name {name}` shows what there is")
    return [_choice(each, aliases) for each in (*first, *(each for each in found if each not in first))]


def _choice(version: Any, aliases: Mapping[str, Any]) -> Choice:
    """A version as a choice, with what its tags tell."""
    number, tags = str(version.version), version.tags
    own = sorted(alias for alias, target in aliases.items() if str(target) == number)
    notes = {"model": version.name, "version": number, "aliases": ", ".join(own)}
    notes |= {
        "trained on": tags.get("data", ""),
        "validation loss": tags.get("val_loss", "")[:6],
        "run": version.run_id,
    }
    title = f"{version.name} version {number}" + (f" ({', '.join(own)})" if own else "")
    phantoms = DataKind.of_version(tags) is DataKind.PHANTOMS
    return Choice(f"models:/{version.name}/{number}", title, {k: v for k, v in notes.items() if v}, phantoms)


def load(uri: str) -> Predictor:
    """The predictor in a logged or registered model, `models:/cxr-pneumonia@champion` say.

    Raises `UserError` when there is none, or it is another program's.
    """
    return read_package(downloaded(uri), uri)


def downloaded(uri: str) -> Path:
    """The folder of a model's package on this machine. Raises `UserError` when there is none."""
    import mlflow

    with _registry_errors(uri):
        local = Path(mlflow.artifacts.download_artifacts(uri))
    cards = list(local.glob(f"**/{CARD}"))
    if len(cards) != 1:
        raise UserError(f"--model {uri}: not a model that cxr logged")
    return cards[0].parent


def read_package(folder: Path, uri: str) -> Predictor:
    """The predictor in a model's package. Raises `UserError`, naming `uri`, when it is damaged."""
    try:
        return Predictor.load(folder)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--model {uri}: is damaged ({reason[:200]})") from error


@contextmanager
def _registry_errors(what: str) -> Iterator[None]:
    """MLflow's own errors as one line, its waits bounded."""
    prepare()
    try:
        with store_errors():
            yield
    except UserError as error:
        raise UserError(f"{what}: {error}; `cxr models list` shows what there is") from error
