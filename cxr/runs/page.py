"""The page of a run: from the verdict in a sentence to how to use the model and how to reproduce it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxr.config import TrainConfig
from cxr.evaluation.metrics import Interval
from cxr.evaluation.multiclass import PER_CLASS
from cxr.evaluation.predictions import HALF, matrix_of
from cxr.evaluation.report import Report, format_interval, interval_words
from cxr.figures.html import Matrix, Number, Page, Section
from cxr.figures.strategies import NAMES
from cxr.parameters import option_name, text_of
from cxr.runs.messages import SPLIT_NAMES, _saturation_lines, data_words
from cxr.runs.result import RunResult
from cxr.tracking.lifecycle import git_commit

CAPTIONS = {
    "learning_curves": "Loss, accuracy and ROC-AUC on training and validation, and the learning rate, by epoch",
    "folds": "The metrics of each fold, their mean and standard deviation",
    "roc": "ROC curve: the share that is found at each rate of false alarms",
    "pr": "Precision against recall; dashed: the precision of calling every image positive",
    "reliability": "Reliability: how often what is predicted with a probability is so; below, the number of images",
    "selective": "Risk and coverage: the accuracy of the most certain images, by the share of images kept",
    "gradcam": "Grad-CAM: where the evidence for the class lies, on images that were decided confidently right, "
    "confidently wrong and narrowly",
}
CHANCE = 0.5  # ROC-AUC
MISSES = 10  # wrong decisions that are listed
LOCAL = ("resume", "cache_dir", "register")  # parameters that say nothing of how a model was made
DOUBTS = "WARNING: "  # how the lines that a person must read begin


def verdict_of(report: Report, name: str) -> str:
    """What a model called `name` achieves on a split, in a sentence."""
    table, auc = report.table, report.interval("roc_auc")
    where = f"On {len(table):,} {_images(report)} of {table['group'].nunique():,} patients, {name}"
    if auc[1] <= CHANCE:
        return f"{where} is not shown to be better than chance: ROC-AUC {interval_words(auc)}."
    if not report.binary:
        return f"{where} decides {_percent(report.interval('accuracy'))} of them right; {_weakest(report)}."
    ill, healthy = report.task.classes[1], report.task.classes[0]
    recall, specificity = report.chosen_values["recall"], report.chosen_values["specificity"]
    return (
        f"{where} tells {ill} from {healthy} with a ROC-AUC of {interval_words(auc)}; at its threshold of "
        f"{report.threshold:.3f} it finds {recall:.1%} of {ill} and clears {specificity:.1%} of {healthy}."
    )


def _images(report: Report) -> str:
    return {"external": "other images", "fold": "out-of-fold images"}.get(report.split, f"{report.split} images")


def _percent(interval: Interval) -> str:
    value, low, high = interval
    return f"{value:.1%} (95% interval {low:.1%} to {high:.1%})" if np.isfinite(low) else f"{value:.1%}"


def _weakest(report: Report) -> str:
    recalls = {
        name: report.values[f"recall_of_{slug}"]
        for name, slug in zip(report.task.classes, report.task.slugs, strict=True)
    }
    worst = min(recalls, key=lambda name: recalls[name])
    return f"it finds {recalls[worst]:.1%} of {worst}, the class that it knows least"


def numbers_of(report: Report) -> list[Number]:
    """The metrics that are shown large: decisions at the model's threshold, if it has one."""
    auc = Number("ROC-AUC", report.interval("roc_auc"))
    if not report.binary:
        names = {"accuracy": "", "balanced_accuracy": "", "ece": "lower is better"}
        return [auc, *(Number(_name(name), report.interval(name), remark) for name, remark in names.items())]
    ill, healthy = report.task.classes[1], report.task.classes[0]
    names = {"accuracy": "accuracy", "recall": f"recall of {ill}", "specificity": f"recall of {healthy} (specificity)"}
    remark = f"threshold {report.threshold:.3f}"
    return [auc, *(Number(shown, report.chosen_interval(name), remark) for name, shown in names.items())]


def report_sections(report: Report, figures: Mapping[str, Figure], title: str = "") -> list[Section]:
    """The metrics of a split with their intervals, its confusion matrices and its `figures` by the names of their
    files. `title` is what it is called, if not by its own name."""
    title = title or SPLIT_NAMES[report.split]
    shown = {CAPTIONS[name]: figures[name] for name in ("roc", "pr", "reliability", "selective") if name in figures}
    return [
        Section(f"{title}: the numbers", tables=_tables(report)),
        Section(f"{title}: decisions", matrices=_matrices(report)),
        Section(f"{title}: what it misses", tables=_misses(report)),
        Section(f"{title}: curves", figures=shown),
    ]


def _tables(report: Report) -> dict[str, pd.DataFrame]:
    """Metrics as text with their intervals: a column for each threshold, or a row for each class."""
    columns = {"at 0.5" if report.binary else "all classes": _texts(report.values, report.bounds)}
    if _has_threshold(report):
        chosen = f"at {report.threshold:.3f}, {report.origin}"
        columns[chosen] = _texts(report.chosen_values, report.chosen_bounds)
    corrected = {name: value for name, value in report.prior.items() if name.startswith("corrected_")}
    columns["corrected for the prevalence here"] = _texts(corrected)
    columns["without calibration"] = _texts(report.before)
    whole = pd.DataFrame({column: cells for column, cells in columns.items() if cells})
    names = [_name(name) for name in report.values if name in whole.index]
    found = {"Metrics with their 95% intervals": whole.rename(_name).loc[names].fillna("")}
    if not report.binary:
        found["Each class against the rest"] = _each_class(report)
    if report.subtypes:
        recalls = pd.DataFrame({"recall at 0.5": report.subtypes})
        found[f"Recall of each kind of {report.task.positive}"] = recalls
    return found


def _misses(report: Report) -> dict[str, pd.DataFrame]:
    """The wrong decisions that it was most certain of, with the probability of the class that was decided for."""
    table, classes = report.table, np.array(report.task.classes)
    wrong = table[table["decision"] != table["label"]]
    if wrong.empty:
        return {}
    labels, decisions = wrong["label"].to_numpy(np.int64), wrong["decision"].to_numpy(np.int64)
    certain = matrix_of(wrong)[np.arange(len(wrong)), decisions]
    rows = {"image": wrong["path"], "true class": classes[labels], "decision": classes[decisions]}
    found = pd.DataFrame({**rows, "probability": certain}).sort_values("probability", ascending=False).head(MISSES)
    return {f"The {len(found)} most certain of {len(wrong)} wrong decisions": found.set_index("image")}


def _has_threshold(report: Report) -> bool:
    """Whether the model decides at another threshold than one half."""
    return report.binary and report.threshold != HALF


def _texts(values: Mapping[str, float], bounds: Mapping[str, tuple[float, float]] | None = None) -> dict[str, str]:
    """Metric -> value and interval, of those that are not of one class."""
    unknown = (float("nan"), float("nan"))
    return {
        name.removeprefix("corrected_"): format_interval((value, *(bounds or {}).get(name, unknown)))
        for name, value in values.items()
        if "_of_" not in name
    }


def _name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def _each_class(report: Report) -> pd.DataFrame:
    """A row for each class, its metrics as text."""
    rows = {
        name: {_name(metric): format_interval(report.interval(f"{metric}_of_{slug}")) for metric in PER_CLASS}
        for name, slug in zip(report.task.classes, report.task.slugs, strict=True)
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _matrices(report: Report) -> dict[str, Matrix]:
    """Confusion matrices: at both thresholds of two classes."""
    classes, caption = report.task.classes, "The most probable class decides"
    if report.binary:
        caption = "At a threshold of 0.5, by which models are compared"
    found = {caption: Matrix(report.counts(), classes)}
    if not _has_threshold(report):
        return found
    own = f"At the model's threshold of {report.threshold:.3f}, {report.origin}"
    return {own: Matrix(report.counts(report.threshold), classes), **found}


def training_page(
    config: TrainConfig, result: RunResult, figures: Mapping[str, Figure], model_id: str | None, registration: str
) -> Page:
    """The page of a training run. `figures` have the names of their files; those of the held-out split none of it."""
    name = f"{config.strategy} fine-tuning of {config.arch}"
    return Page(
        f"{config.strategy}, seed {config.seed}",
        verdict_of(result.test, name),
        [
            *report_sections(result.test, figures),
            Section("What it looks at", figures=_chosen(figures, "gradcam")),
            Section("What training did", _training(config, result), figures=_chosen(figures, "learning_curves")),
            Section("Audit of the images", findings=result.findings),
            Section("Use the model", [registration], commands=_use(model_id)),
            Section("Reproduce it", _origin(result), commands=_again(config, result)),
        ],
        subtitle=f"{config.arch}, {config.image_size} pixels; {data_words(result.data)}; run {result.run_id}",
        warnings=_warnings(result),
        numbers=numbers_of(result.test),
    )


def evaluation_page(
    title: str,
    report: Report,
    figures: Mapping[str, Figure],
    lines: Sequence[str],
    model: str,
    model_id: str | None = None,
) -> Page:
    """The page of an evaluation of `model` on other images, or of an ensemble; `lines` are what was said of it."""
    doubts = [line.removeprefix(DOUBTS) for line in lines if line.startswith(DOUBTS)]
    notes = [line for line in lines if not line.startswith(DOUBTS)]
    sections = [
        *report_sections(report, figures),
        Section("What else was found", notes=notes),
        Section("Use the model", commands=_use(model_id)),
    ]
    return Page(title, verdict_of(report, model), sections, warnings=doubts, numbers=numbers_of(report))


def crossval_page(name: str, table: pd.DataFrame, pooled: Report, figures: Mapping[str, Figure]) -> Page:
    """The page of a cross-validation: its folds (a row of `table` each), and their predictions pooled."""
    auc, spread = table["roc_auc"].mean(), table["roc_auc"].std(ddof=1)
    verdict = (
        f"Over {len(table)} folds by patient, without the test split, {name} reaches a ROC-AUC of {auc:.3f} "
        f"± {spread:.3f} (mean and standard deviation); pooled {interval_words(pooled.interval('roc_auc'))}."
    )
    about = "The pooled predictions are those of all the models, each on its own fold; intervals cover patients only."
    folds = Section(
        "Folds", tables={"Metrics of each fold": table.set_index("fold")}, figures=_chosen(figures, "folds")
    )
    return Page(
        f"Cross-validation: {name}",
        verdict,
        [folds, Section("Pooled", [about]), *report_sections(pooled, figures, "Pooled")],
        numbers=numbers_of(pooled),
    )


def _chosen(figures: Mapping[str, Figure], name: str) -> dict[str, Figure]:
    return {CAPTIONS[name]: figures[name]} if name in figures else {}


def _training(config: TrainConfig, result: RunResult) -> list[str]:
    best, cost = result.best, f"{result.seconds:,.0f} s in all, {result.peak_memory:,.0f} MB of memory at most"
    return [
        f"{len(result.records)} epochs; the best is epoch {best.epoch} (phase {best.phase}) by {config.select}. {cost}."
    ]


def _warnings(result: RunResult) -> list[str]:
    """What a reader must know before the numbers."""
    data, found = result.data, [finding.check for finding in result.findings if not finding.ok]
    uses = f"This {result.test.split} split was evaluated {result.uses_before} times before in this tracking store"
    return [
        *(["The images are synthetic phantoms: the numbers say nothing about X-rays."] * data.synthetic),
        *(["The weights were random at the start: nothing was fine-tuned."] * result.weights.random),
        *([f"{len(data.bad)} unreadable images were left out."] * bool(data.bad)),
        *([f"{uses}: what was chosen after seeing the results is not tested by it."] * (result.uses_before > 0)),
        *(line.removeprefix("note: ") for line in _saturation_lines(result)),
        *([f"The audit of the images warns of {', '.join(found)}; see below."] * bool(found)),
    ]


def _use(model_id: str | None) -> dict[str, str]:
    if model_id is None:
        return {}
    uri = f"models:/{model_id}"
    lines = (
        "import mlflow",
        "",
        'mlflow.set_tracking_uri("…")  # the tracking store of this run',
        f'model = mlflow.pyfunc.load_model("{uri}")',
        'model.predict([open("film.png", "rb").read()])',
    )
    return {
        "In Python, without cxr": "\n".join(lines),
        "At the command line": f"uv run cxr predict film.png --model {uri}\nuv run cxr explain film.png --model {uri}",
    }


def _origin(result: RunResult) -> list[str]:
    weights, data = result.weights, result.data
    return [
        f"Code {git_commit()}, weights {weights}, images {data.fingerprint}. The same machine gives the same numbers."
    ]


def _again(config: TrainConfig, result: RunResult) -> dict[str, str]:
    """Commands that make the run again, and that check it."""
    default = TrainConfig()
    options = [
        f"{option_name(item.name)} {shlex.quote(text_of(getattr(config, item.name)))}"
        for item in fields(config)
        if item.name not in LOCAL and getattr(config, item.name) != getattr(default, item.name)
    ]
    return {
        "Train it again": " ".join(["uv run cxr train", *options]),
        "Recompute everything that was logged": f"uv run cxr models verify {result.run_id}",
    }
