"""Model cards (Mitchell et al. 2019, "Model Cards for Model Reporting"): what a model is for, on what it was measured
and where it fails, as Markdown.

A card is made of what the run has logged, so that it says the same as the run, and can be made for a run of any age. It
is the description of a registered version, and goes with an exported model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from cxr.errors import MachineError, UserError
from cxr.evaluation.metrics import DECISION_METRICS, METRICS
from cxr.evaluation.report import format_interval
from cxr.evaluation.subgroups import by_subtype
from cxr.figures.html import template_environment
from cxr.serving.predictor import ModelCard
from cxr.task import KAGGLE, SUBTYPES, Task
from cxr.tracking.descriptions import LONGEST, OF_CHAMPION, describe_model, describe_version
from cxr.tracking.outage import pages_address, waits
from cxr.tracking.reading import LoggedRun, Tag, data_sets, source_run
from cxr.tracking.registry import DataKind, Registration, registered_as
from cxr.tracking.store import one_at_a_time, store_errors

FILE = "MODEL_CARD.md"
ROWS = (50, 12, 4, 0)  # of the tables of classes and subgroups: fewer until a description is short enough
_LONG = 160  # characters of a value
_SPACE = "\N{NO-BREAK SPACE}" * 2
_GAP = 0.02  # in ROC-AUC, from which on it is a limit
_NOTHING = "nothing found"  # by the audit
_TEMPLATE = "model_card.md.jinja"
_HELD_OUT = ("test", "fold")
_OF_CLASS = ("recall", "precision", "roc_auc")
_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "recall": "recall (sensitivity)",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "brier": "Brier score",
    "log_loss": "log loss",
    "ece": "calibration error (ECE)",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What a card is about: what the package says of itself, the run that logged it (None where the store has none),
    a heading, the URI by which the model is loaded, and the ID of the logged model."""

    card: ModelCard
    run: LoggedRun | None
    title: str
    uri: str
    model_id: str | None = None


def card_text(subject: Subject, pages: str = "", rows: int = ROWS[0]) -> str:
    """The card. `pages` is the address of MLflow's pages, empty for a card that is read there.

    At most `rows` rows of the tables of classes (the worst first) and of subgroups (the largest first) are shown.
    """
    return _environment().get_template(_TEMPLATE).render(**_facts(subject, rows), pages=pages)


@waits
def described(registration: Registration, card: ModelCard, run_id: str, model_id: str) -> Registration:
    """Make the card of a model the description of its version, and of the registered model if it is the champion."""
    name, version = registration.name, registration.version
    run = LoggedRun.open(run_id)
    subject = Subject(card, run, f"{name}, version {version}", f"models:/{name}/{version}", model_id)
    with store_errors(), one_at_a_time():
        describe_version(name, version, description(subject))
        describe_model(name)
    return registration


def write_card(uri: str, card: ModelCard, folder: Path) -> Path:
    """Write the card of a logged or registered model into a folder; returns the file.

    Raises `UserError` if it cannot be written. Where the store does not have the model's run, the card says so.
    """
    named, file = registered_as(uri), folder / FILE
    title = f"{named[0]}, version {named[1]}" if named else uri
    subject = Subject(card, None, title, f"models:/{named[0]}/{named[1]}" if named else uri)
    text, run_id = card_text(subject), source_run(uri)
    if run_id:
        with suppress(MachineError):  # the run, or its artifacts, may be gone while the model is there
            text = card_text(replace(subject, run=LoggedRun.open(run_id)), f"{pages_address()}/")
    try:
        file.write_text(text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); name another folder") from error
    return file


def description(subject: Subject) -> str:
    """The card, as short as MLflow's tables need it."""
    longest = LONGEST - len(OF_CHAMPION) - 20
    for rows in ROWS:
        if len(text := card_text(subject, rows=rows)) <= longest:
            break
    return text[:longest]


def _environment() -> Environment:
    return template_environment("cxr.tracking", {"plain": _plain, "row": _row, "interval": format_interval}, html=False)


def _plain(text: str) -> str:
    """Text of bounded length in which Markdown and HTML find nothing to mark up."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line if len(line) <= _LONG else f"{line[: _LONG - 1]}…")


def _row(cells: Sequence[str]) -> str:
    """A row of a table. MLflow's pages set no space between columns, so each cell ends with some."""
    return f"| {' | '.join(cell + _SPACE for cell in cells)} |"


def _facts(subject: Subject, rows: int) -> dict[str, Any]:
    """Everything that the template names."""
    card, run = subject.card, subject.run
    facts = {"subject": subject, "card": card, "task": card.task, "run": run}
    if run is None:
        return facts
    split = next((name for name in _HELD_OUT if not isnan(run.metric(f"{name}_roc_auc"))), None)
    facts |= {
        "data": data_sets(run.run_id),
        "views": _recipe(run.train_params()),
        "phantoms": run.tags.get(Tag.DATA) == DataKind.PHANTOMS,
        "limits": _limits(run),
        "split": split,
    }
    return facts | (_measured(card, run, split, rows) if split else {})


def _measured(card: ModelCard, run: LoggedRun, split: str, rows: int) -> dict[str, Any]:
    """What was measured on the held-out images."""
    table = run.predictions(split)
    subgroups = by_subtype(table) if card.task.binary and table["subtype"].nunique() > 2 else []
    classes = [] if card.task.binary else _class_rows(run, split, card.task)
    return {
        "images": len(table),
        "patients": table["group"].nunique(),
        "metrics": _metric_rows(run, split, card),
        "classes": classes[:rows],
        "hidden": len(classes[rows:]),
        "subgroups": subgroups[:rows],
        "children": _is_kaggle(run, card.task, table),
        "shown": lambda name: _shown(run, f"{split}_{name}"),
        "known": lambda name: f"{split}_{name}" in run.every_metric(),
        "percent": lambda name: f"{run.metric(f'{split}_{name}'):.1%}",
    }


def _shown(run: LoggedRun, name: str) -> str:
    """A metric with its interval; `n/a` if it was not logged."""
    value = run.metric(name)
    return "n/a" if isnan(value) else format_interval((value, run.metric(f"{name}_low"), run.metric(f"{name}_high")))


def _metric_rows(run: LoggedRun, split: str, card: ModelCard) -> list[list[str]]:
    """The table of metrics, its heading first: of two classes at both thresholds."""
    binary = card.task.binary
    rows = [["metric", "at 0.5", f"at {card.threshold:.4g}"] if binary else ["metric", "of all classes"]]
    for name in METRICS:
        half = _shown(run, f"{split}_{name}")
        chosen = _shown(run, f"{split}_chosen_{name}") if name in DECISION_METRICS else ""
        rows.append([_NAMES.get(name, name), half, *([chosen] * binary)])
    return rows


def _class_rows(run: LoggedRun, split: str, task: Task) -> list[list[str]]:
    """A row for each class, that of the lowest recall first."""
    keys = {slug: [f"{split}_{metric}_of_{slug}" for metric in _OF_CLASS] for slug in task.slugs}
    order = sorted(zip(task.classes, task.slugs, strict=True), key=lambda named: run.metric(keys[named[1]][0]))
    return [[_plain(name), *(_shown(run, key) for key in keys[slug])] for name, slug in order]


def _is_kaggle(run: LoggedRun, task: Task, table: pd.DataFrame) -> bool:
    """Whether the images are named as those of the Kaggle set, and are no phantoms."""
    named = {"bacteria", "virus"} <= set(table["subtype"])
    return named and task in (KAGGLE, SUBTYPES) and run.tags.get(Tag.DATA) != DataKind.PHANTOMS


def _recipe(params: Mapping[str, str]) -> str:
    """That of the augmented views which a run trained on; empty if there were none, or it does not say."""
    return "" if params.get("views") == "0" else params.get("augment", "")


def _limits(run: LoggedRun) -> list[str]:
    """What the run found out about the limits of its model and its data."""
    gap, before = run.metric("val_test_gap_roc_auc"), run.metric("test_uses_before")
    audit, skipped = run.tags.get(Tag.AUDIT, _NOTHING), run.tags.get(Tag.IMAGES_SKIPPED, "0")
    said = {
        f"ROC-AUC is {gap:.3f} lower on the held-out images than on validation; elsewhere it may be lower still.": (
            gap > _GAP
        ),
        f"The audit of the images found: {audit}.": audit != _NOTHING,
        f"{skipped} unreadable images were left out.": skipped != "0",
        f"The held-out images were evaluated {before:.0f} times before in this tracking store.": before > 0,
    }
    return [text for text, applies in said.items() if applies]
