"""The shared views of MLflow's runs page."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from ui import mlflow_ui
from visit import needs_chromium, opened

from cxr.tracking import views
from cxr.tracking.reading import RunKind, Tag
from cxr.tracking.tracker import MlflowTracker
from cxr.tracking.views import LONGEST, MOST, TAG, key_of, name_of, saved_view, state_of

RATES = [f"train.lr_{name}" for name in ("head", "top", "all")]
KINDS = (None, RunKind.COMPARISON, RunKind.SEARCH, RunKind.CROSSVAL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_fits_into_a_tag_and_shows_metrics_of_test_or_validation(kind: RunKind | None) -> None:
    state = state_of(kind, "0" * 32, RATES)
    assert 2.4 * len(json.dumps(state)) < LONGEST  # the text of a view with a name
    shown = state["selectedColumns"]
    assert any("roc_auc" in column for column in shown)
    assert state["orderByKey"] in shown
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == len(state["compareRunCharts"]) >= 2
    inside = "tags.`mlflow.parentRunId` = '" + "0" * 32 + "'"
    own = f"{inside} AND tags.`cxr.kind` = 'member'" if kind is RunKind.COMPARISON else inside
    assert state["searchFilter"] == (own if kind else "")
    assert bool(state["groupBy"]) == (kind is RunKind.COMPARISON)
    assert not kind or all(rate in str(state["compareRunCharts"]) for rate in RATES) == (kind is RunKind.SEARCH)


def test_the_links_of_a_run_name_views_that_are_there(in_store: str) -> None:
    mlflow.set_experiment("cxr")
    with mlflow.start_run() as run:
        tracker = MlflowTracker(run)
        command, own, every = tracker.where()
        _, children, parent = tracker.where(RunKind.COMPARISON)
    assert command.startswith("mlflow ui --backend-store-uri sqlite:")
    page = f"http://127.0.0.1:5000/#/experiments/1/runs/{tracker.run_id}"
    assert own == f"{page}/artifacts/REPORT.html?{views.OPENS}"
    assert parent == f"{page}?{views.OPENS}"
    tags = mlflow.get_experiment("1").tags
    for link, kind in ((every, None), (children, RunKind.COMPARISON)):
        key = key_of(kind, tracker.run_id)
        assert f"/runs?viewStateShareKey={key}&" in link
        found, state = json.loads(tags[f"{TAG}{key}"]), state_of(kind, tracker.run_id)
        assert json.loads(found["state"]) == state
        assert found.items() >= state.items()  # as MLflow read it before views had names
        assert found["name"] == name_of(kind, tracker.run_id)


def test_a_menu_that_is_full_gets_no_more_names(in_store: str) -> None:
    own = mlflow.create_experiment("many views")
    for number in range(MOST + 1):
        saved_view(own, f"view-{number}", state_of(None), f"name {number}")
    saved_view(own, "view-0", state_of(None), "another name")
    found = {key: json.loads(text) for key, text in mlflow.get_experiment(own).tags.items() if key.startswith(TAG)}
    assert len(found) == MOST + 1
    assert found[f"{TAG}view-0"]["name"] == "another name"
    assert [key for key, view in found.items() if "name" not in view] == [f"{TAG}view-{MOST}"]


def test_where_a_view_cannot_be_written_the_link_opens_the_plain_page(
    in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: object) -> None:
        raise MlflowException("PERMISSION_DENIED")

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", forbidden)
    assert saved_view("0", "cxr-runs", state_of(None), "all runs") == f"runs?{views.OPENS}"


@pytest.fixture
def ui(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(address of an MLflow UI, ID of a parent with four children of two strategies)."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("cxr")
    with mlflow.start_run(run_name="compare-2x2") as parent:
        for number, (strategy, auc) in enumerate(
            [("frozen", 0.25), ("frozen", 0.75), ("full", 0.875), ("full", 0.625)]
        ):
            with mlflow.start_run(run_name=f"{strategy}-s{number}", nested=True):
                mlflow.set_tag(Tag.KIND, RunKind.MEMBER)
                mlflow.log_params({"train.strategy": strategy, "train.seed": number})
                mlflow.log_metrics({"test_roc_auc": auc, "val_loss": 0.5, "total_seconds": 3.0})
        with mlflow.start_run(run_name="ensemble-2", nested=True):
            mlflow.set_tag(Tag.KIND, RunKind.ENSEMBLE)
            mlflow.log_params({"train.strategy": "full"})
            mlflow.log_metrics({"test_roc_auc": 0.15})
    with mlflow_ui(store) as address:
        yield address, parent.info.run_id


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_the_runs_of_a_comparison_by_strategy(ui: tuple[str, str], tmp_path: Path) -> None:
    address, parent = ui
    kind = RunKind.COMPARISON
    view = saved_view("1", key_of(kind, parent), state_of(kind, parent), name_of(kind, parent))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    options = ["--window-size=1800,1000", "--virtual-time-budget=20000", "--dump-dom"]
    found = subprocess.run([*command, *options, f"{address}/#/experiments/1/{view}"], capture_output=True, timeout=120)
    page = found.stdout.decode()
    assert "Group: frozen" in page
    assert "Group: full" in page
    assert "test_roc_auc" in page
    assert all(f"full-s{number}" in page for number in (2, 3))
    assert "0.5" in page  # the mean of frozen
    assert "0.75" in page  # that of full, too
    assert "compare-2x2" not in page
    assert "ensemble-2" not in page  # it would enter the means
    assert f"cxr: comparison {parent[:8]}" in page  # the name of the open view, on the button of the menu


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_the_chosen_columns_and_charts_of_all_runs(ui: tuple[str, str]) -> None:
    address, _ = ui
    view = f"{address}/#/experiments/1/{saved_view('1', key_of(None), state_of(None), name_of(None))}"
    with opened(view, 1800) as (page, _):
        for column in ("test_roc_auc", "total_seconds", "train.strategy", "train.seed"):
            page.get_by_text(column, exact=True).first.wait_for()
        for run in ("frozen-s0", "frozen-s1", "full-s2", "full-s3"):
            page.get_by_text(run, exact=True).first.wait_for()
    with opened(f"{view}&compareRunsMode=CHART", 1800) as (page, _):
        page.locator(".js-plotly-plot").nth(2).wait_for()  # losses, ROC-AUC, quality against cost
        assert page.get_by_text("total_seconds vs. test_roc_auc").first.is_visible()
