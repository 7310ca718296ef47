"""The page of a run."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from browser import printed_pages, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from visit import needs_chromium

from cxr.config import TrainConfig
from cxr.evaluation.calibration import IDENTITY
from cxr.evaluation.predictions import predictions_table
from cxr.evaluation.report import MAIN, Report, evaluate, origin_of
from cxr.figures.html import html_page
from cxr.runs.page import crossval_page, evaluation_page, numbers_of, report_sections, verdict_of
from cxr.runs.result import RunResult
from cxr.task import KAGGLE, SUBTYPES, Task
from cxr.threshold_rule import ThresholdRule

Finished = tuple[TrainConfig, RunResult, mlflow.entities.Run]
DARK = 60  # of 255


def report(task: Task = KAGGLE, threshold: float = 0.4, sign: float = 1.0, resamples: int = 40, n: int = 60) -> Report:
    """Of logits that are right more often than not, or less often with a negative `sign`."""
    labels = np.arange(n) % len(task.classes)
    names = {"path": [f"{i}.png" for i in range(n)], "digest": [f"{i:064x}" for i in range(n)]}
    rows = pd.DataFrame({**names, "group": [f"p{i // 2}" for i in range(n)], "subtype": "unknown", "label": labels})
    noise = np.random.default_rng(0).normal(size=(n, len(task.classes)))
    logits = (noise + sign * np.eye(len(task.classes))[labels]).astype(np.float32)
    table = predictions_table(rows.assign(split="test"), logits, threshold, IDENTITY, task)
    origin = origin_of(ThresholdRule.parse("youden"), "test")
    return evaluate(table, "test", threshold, resamples, 0.5, origin).about(task)


def test_the_verdict_names_images_interval_and_what_is_found_at_the_threshold() -> None:
    one = report()
    auc, low, high = one.interval("roc_auc")
    assert verdict_of(one, "partial") == (
        f"On 60 test images of 30 patients, partial tells PNEUMONIA from NORMAL with a ROC-AUC of {auc:.3f} (95% "
        f"interval {low:.3f} to {high:.3f}); at its threshold of 0.400 it finds {one.chosen_values['recall']:.1%} of "
        f"PNEUMONIA and clears {one.chosen_values['specificity']:.1%} of NORMAL."
    )


def test_the_verdict_on_several_classes_names_the_weakest() -> None:
    three = report(SUBTYPES)
    recalls = {name: three.values[f"recall_of_{name.lower()}"] for name in SUBTYPES.classes}
    worst = min(recalls, key=lambda name: recalls[name])
    accuracy = three.values["accuracy"]
    said = verdict_of(three, "partial")
    assert f"decides {accuracy:.1%} (95% interval" in said
    assert said.endswith(f"it finds {recalls[worst]:.1%} of {worst}, the class that it knows least.")


@pytest.mark.parametrize("task", [KAGGLE, SUBTYPES])
def test_a_model_that_is_not_better_than_chance_is_called_so(task: Task) -> None:
    assert "is not shown to be better than chance" in verdict_of(report(task, sign=-0.5), "partial")
    assert "chance" not in verdict_of(report(task, sign=2.0, resamples=0), "partial")


@given(st.floats(0.05, 0.95), st.floats(-1, 4), st.integers(2, 6))
@settings(max_examples=15)
def test_whatever_the_model_does_the_page_can_be_made(threshold: float, sign: float, classes: int) -> None:
    task = KAGGLE if classes == 2 else Task(tuple(f"class <{number}>" for number in range(classes)))
    one = report(task, threshold, sign, resamples=0)
    page = html_page(evaluation_page("Title", one, {}, ["WARNING: copies", "a drop"], "m"))
    assert page.count('<div class="card number-card">') == 4
    assert page.count('<table class="matrix">') == (2 if classes == 2 and threshold != 0.5 else 1)
    assert page.index("<li>copies</li>") < page.index("<main>") < page.index("<li>a drop</li>")
    assert "class <0>" not in page


def test_the_tables_have_every_metric_with_its_interval() -> None:
    for one in (report(), report(SUBTYPES)):
        tables = report_sections(one, {})[0].tables
        whole = tables["Metrics with their 95% intervals"]
        assert len(whole) == sum("_of_" not in name for name in one.values)
        assert "0." in whole.loc["ROC-AUC"].iloc[0]
        assert all("[" in whole.loc[name].iloc[0] for name in ("accuracy", "recall"))
        assert ("Each class against the rest" in tables) == (one.task == SUBTYPES)
    assert len(numbers_of(report())) == len(MAIN)


def test_a_threshold_of_one_half_is_shown_once() -> None:
    own, half = (report_sections(report(threshold=threshold), {}) for threshold in (0.4, 0.5))
    assert [len(section.matrices) for section in own] == [0, 2, 0, 0]
    assert [len(section.matrices) for section in half] == [0, 1, 0, 0]
    assert any("at 0.400" in column for column in own[0].tables["Metrics with their 95% intervals"])
    assert not any("at 0.500" in column for column in half[0].tables["Metrics with their 95% intervals"])


@pytest.mark.parametrize("task", [KAGGLE, SUBTYPES])
def test_the_wrong_decisions_that_it_was_most_certain_of_are_listed(task: Task) -> None:
    one = report(task)
    wrong = one.table[one.table["decision"] != one.table["label"]]
    ((caption, shown),) = report_sections(one, {})[2].tables.items()
    assert caption == f"The {len(shown)} most certain of {len(wrong)} wrong decisions"
    assert set(shown.index) <= set(wrong["path"])
    assert (shown["true class"] != shown["decision"]).all()
    assert list(shown["probability"]) == sorted(shown["probability"], reverse=True)


def test_a_cross_validation_has_its_folds_and_their_pool() -> None:
    table = pd.DataFrame({"fold": [1, 2, 3], "roc_auc": [0.7, 0.8, 0.9], "run": ["a", "b", "c"]})
    page = html_page(crossval_page("frozen", table, report(threshold=0.5), {}))
    assert "Over 3 folds by patient, without the test split, frozen reaches a ROC-AUC of 0.800 ± 0.100" in page
    assert "Pooled: the numbers" in page


def page_of(finished: Finished) -> str:
    return str(mlflow.artifacts.load_text(f"{finished[2].info.artifact_uri}/REPORT.html"))


def test_a_run_has_its_page_as_the_first_file(finished: Finished, in_store: str) -> None:
    _, result, run = finished
    files = mlflow.MlflowClient().list_artifacts(run.info.run_id)
    assert next(file.path for file in files if not file.is_dir) == "REPORT.html"
    page = page_of(finished)
    assert page.count("<svg") == 5  # ROC, PR, reliability, risk and coverage, learning curves
    assert page.count("<img") == 1  # Grad-CAM
    for part in (
        verdict_of(result.test, "gradual fine-tuning of resnet18"),
        "The weights were random at the start",
        "Audit of the images",
        f"cxr models verify {run.info.run_id}",
        "uv run cxr train --strategy gradual",
        'mlflow.pyfunc.load_model("models:/m-',
    ):
        assert part.replace('"', "&#34;") in page
    assert not re.search(r"<script|<link|https?://", page)
    assert len(page) < 1_000_000


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_shows_the_page_without_overflow_light_and_dark(
    finished: Finished, in_store: str, tmp_path: Path, width: int
) -> None:
    page = page_of(finished)
    for dark in (False, True):
        found = seen(page, width, tmp_path, dark=dark)
        assert found.wide == []
        assert found.width <= width
        assert len(found.drawn) == 6
        assert min(found.drawn) > 100
        assert found.contrast > 7
        assert all((int(part) < DARK) == dark for part in re.findall(r"\d+", found.background)[:3])


@pytest.mark.slow
@needs_chromium
def test_the_page_is_printed_on_a_few_sheets(finished: Finished, in_store: str, tmp_path: Path) -> None:
    assert 3 <= printed_pages(page_of(finished), tmp_path) <= 9
