"""Model cards: what they say, how long they may be, and where they end up."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from command import run_main
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import Dataset, DatasetInput, InputTag, Run
from mlflow.tracking import MlflowClient
from ui import mlflow_ui
from visit import needs_chromium, opened

from cxr.config import TrainConfig
from cxr.errors import MachineError, UserError
from cxr.evaluation.report import format_interval
from cxr.runs.result import RunResult
from cxr.serving.predictor import ModelCard, save_package
from cxr.task import Task
from cxr.tracking import cards, registry
from cxr.tracking.cards import Subject, card_text, description
from cxr.tracking.descriptions import LONGEST
from cxr.tracking.reading import DataSet, LoggedRun, data_sets

NAME = "cxr-pneumonia"
Finished = tuple[TrainConfig, RunResult, Run]


def card_for(classes: tuple[str, ...], strategy: str = "partial") -> ModelCard:
    return ModelCard("resnet18", 64, "squash", 0.4, strategy, "0123456789ab", "random", Task(classes).class_to_index)


def logged_run(metrics: dict[str, float], run_id: str = "0" * 32) -> LoggedRun:
    return LoggedRun(run_id, "1", "partial-s0", "FINISHED", {}, {}, metrics, "")


def test_a_version_is_described_by_the_numbers_of_its_run(finished: Finished, in_store: str) -> None:
    _, result, _ = finished
    text = MlflowClient().get_model_version(NAME, "1").description
    test = result.test
    assert len(text) <= LONGEST
    for metric in ("accuracy", "recall", "roc_auc", "ece"):
        assert format_interval(test.interval(metric)) in text
    assert format_interval(test.chosen_interval("specificity")) in text
    assert f"On {len(test.table)} held-out images of {test.table['group'].nunique()} patients" in text
    for heading in ("Intended use", "Data", "Performance", "Probability and threshold", "Limits", "Use"):
        assert f"\n## {heading}\n" in text
    assert "| bacteria" in text
    assert "Not for clinical use" in text
    assert f"experiments/{finished[2].info.experiment_id}/runs/{result.run_id}" in text
    assert "models/m-" in text


def test_a_registered_model_is_described_by_the_card_of_its_champion(finished: Finished, in_store: str) -> None:
    own = MlflowClient().get_model_version(NAME, "1").description
    text = MlflowClient().get_registered_model(NAME).description
    assert text.startswith("Card of version 1, champion when this was written")
    assert text.endswith(own)
    assert len(text) <= LONGEST


@pytest.mark.parametrize(
    ("params", "recipe"),
    [({"augment": "crops-2", "views": "6"}, "crops-2"), ({"augment": "crops-2", "views": "0"}, ""), ({}, "")],
)
def test_a_card_names_the_recipe_of_views_only_if_there_were_any(params: dict[str, str], recipe: str) -> None:
    assert cards._recipe(params) == recipe


def test_data_sets_are_noted_by_name_and_fingerprint(finished: Finished, in_store: str) -> None:
    _, result, _ = finished
    found = data_sets(result.run_id)
    assert {use: own.name for use, own in found.items()} == {
        "training": "chest_xray-train",
        "validation": "chest_xray-val",
        "testing": "chest_xray-test",
    }
    version = MlflowClient().get_model_version(NAME, "1")
    assert found["validation"].digest == version.tags["val_fingerprint"]
    assert found["testing"].digest == finished[2].data.tags["test_split"]
    assert found["testing"].images == len(result.test.table)


def test_data_sets_of_version_0_1_are_read(in_store: str) -> None:
    mlflow.set_experiment("cxr")
    with mlflow.start_run() as run:
        old = Dataset("0123456789ab-train", "fedcba98", "local", "{}", profile='{"num_rows": 7}')
        inputs = [DatasetInput(old, [InputTag("mlflow.data.context", "training")])]
        MlflowClient().log_inputs(run.info.run_id, inputs)
    assert data_sets(run.info.run_id) == {"training": DataSet("0123456789ab-train", "fedcba98", 7)}
    assert "0123456789ab-train" in card_text(Subject(card_for(("A", "B")), logged_run({}, run.info.run_id), "t", "u"))


def test_the_champion_of_older_code_has_no_card_and_words_of_a_person_stay(
    finished: Finished, in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, name = MlflowClient(), "described"
    for number in ("1", "2"):
        model = mlflow.initialize_logged_model(name="empty", experiment_id=finished[2].info.experiment_id)
        mlflow.finalize_logged_model(model.model_id, "READY")
        mlflow.register_model(f"models:/{model.model_id}", name, tags={"run_id": number})
    assert run_main(monkeypatch, "models", "promote", "1", "--name", name) == 0
    assert "Version 1 was registered without a card" in client.get_registered_model(name).description
    client.update_model_version(name, "2", "a card")
    assert run_main(monkeypatch, "models", "promote", "2", "--name", name) == 0
    assert client.get_registered_model(name).description.endswith("\n\na card")
    client.update_registered_model(name, "ask the ward before use")
    assert run_main(monkeypatch, "models", "promote", "1", "--name", name) == 0
    assert client.get_registered_model(name).description == "ask the ward before use"


def test_an_exported_model_goes_with_its_card(
    finished: Finished, in_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "models", "export", str(tmp_path)) == 0
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert text.startswith(f"# {NAME}, version 1\n")
    assert f"(http://127.0.0.1:5000/#/experiments/{finished[2].info.experiment_id}/runs/{finished[1].run_id})" in text
    assert format_interval(finished[1].test.interval("roc_auc")) in text


def test_the_card_of_a_model_without_a_run_says_so(finished: Finished, in_store: str, tmp_path: Path) -> None:
    predictor = registry.load("models:/cxr-pneumonia@champion")
    save_package(tmp_path / "package", predictor.model.state_dict(), predictor.card)
    file = cards.write_card(str(tmp_path / "package"), predictor.card, tmp_path)
    assert "Not known here: the tracking store in use has no results of this model." in file.read_text()
    assert predictor.card.data_fingerprint in file.read_text()
    with pytest.raises(UserError, match="name another folder"):
        cards.write_card(str(tmp_path / "package"), predictor.card, tmp_path / "absent")


def test_a_model_is_exported_though_its_run_is_gone(
    finished: Finished, in_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(run_id: str) -> LoggedRun:
        raise MachineError(f"run {run_id} not found")

    monkeypatch.setattr(LoggedRun, "open", gone)
    assert run_main(monkeypatch, "models", "export", str(tmp_path)) == 0
    assert "Not known here" in (tmp_path / "MODEL_CARD.md").read_text()


def test_a_description_of_many_long_classes_fits_and_names_the_worst(
    in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple(f"{number:02} {'finding ' * 11}" for number in range(50))
    task = Task(names)
    table = pd.DataFrame({"subtype": ["unknown"] * 2, "group": ["a", "b"], "label": [0, 1], "decision": [0, 1]})
    metrics = {f"test_recall_of_{slug}": 0.9 - number / 100 for number, slug in enumerate(task.slugs)}
    run = logged_run({"test_roc_auc": 0.9, **metrics})
    monkeypatch.setattr(LoggedRun, "predictions", lambda run, split: table)
    monkeypatch.setattr(LoggedRun, "tabled_metrics", lambda run: {})
    monkeypatch.setattr(cards, "data_sets", lambda run_id: {})
    subject = Subject(card_for(names), run, "many, version 1", "models:/many/1", "m-0")
    text = description(subject)
    assert len(text) < LONGEST < len(card_text(subject))
    assert "49 finding" in text
    assert "38 other classes" in text
    assert text.rstrip().endswith(".")


@given(st.text())
def test_text_of_users_neither_breaks_a_table_nor_marks_up(text: str) -> None:
    shown = cards._plain(text)
    assert len(shown.splitlines()) <= 1
    assert not any(mark in shown.replace("\\\\", "").replace(f"\\{mark}", "") for mark in "|<*`[")


@pytest.mark.parametrize(
    ("uri", "found"), [(f"models:/{NAME}/1", (NAME, "1")), ("models:/m-0123", None), ("runs:/0123/model", None)]
)
def test_a_uri_names_a_registered_version_or_none(uri: str, found: tuple[str, str] | None, in_store: str) -> None:
    assert registry.registered_as(uri) == found


def test_an_alias_is_resolved_and_a_missing_one_is_a_user_error(finished: Finished, in_store: str) -> None:
    assert registry.registered_as(f"models:/{NAME}@champion") == (NAME, "1")
    with pytest.raises(UserError, match="nobody"):
        registry.registered_as(f"models:/{NAME}@nobody")


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_the_card_and_its_links_lead_to_run_and_model(finished: Finished, in_store: str) -> None:
    with mlflow_ui(in_store) as address, opened(f"{address}/#/models/{NAME}/versions/1") as (page, _):
        page.wait_for_selector("h2:text('Intended use')")
        cells = page.locator("tr", has_text="ROC-AUC").first.locator("td").all_inner_texts()
        assert [cell.strip() for cell in cells] == [
            "ROC-AUC",
            format_interval(finished[1].test.interval("roc_auc")),
            "",
        ]
        assert page.get_by_text("chest_xray-train").is_visible()
        for link, path in (
            (f"run {finished[2].info.run_name}", f"/runs/{finished[1].run_id}"),
            ("logged model", "/models/m-"),
        ):
            with page.expect_popup() as popup:
                page.get_by_role("link", name=link).click()
            assert popup.value.url.startswith(f"{address}/#/experiments/")
            assert path in popup.value.url
        page.goto(f"{address}/#/models/{NAME}")
        page.wait_for_selector("text=Card of version 1, champion when this was written")
