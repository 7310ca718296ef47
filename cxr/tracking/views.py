"""Shared views of MLflow's runs page: the columns, charts and filters with which a link opens it.

A view is a tag of the experiment, `mlflow.sharedViewState.KEY`, with the state of the page as JSON, as the page's own
"Share" writes it; a link names the key. With a name, MLflow 3.17 lists it in the page's menu "Views". Another version
of MLflow ignores what it does not know in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cxr.errors import UserError
from cxr.tracking.reading import RunKind, Tag
from cxr.tracking.store import store_errors

TAG = "mlflow.sharedViewState."
LONGEST = 5000  # characters of an experiment's tag
MOST = 20  # views of ours in the menu, which has room for 40
OPENS = "workflowType=machine_learning"  # else the UI shows its pages for language models
Chart = dict[str, Any]

_IDENTITY = ("attributes.`Created`", "attributes.`Duration`")
_ON_TEST = ("val_roc_auc", "test_roc_auc", "test_roc_auc_low", "test_roc_auc_high", "test_accuracy", "test_recall")
_RUN = (*_ON_TEST, "test_specificity", "total_seconds")
_LOSSES: Chart = {"type": "LINE", "metricKey": "val_loss", "selectedMetricKeys": ["val_loss", "train_loss"]}
_QUALITY: Chart = {"type": "BAR", "metricKey": "test_roc_auc"}
_COST: Chart = {
    "type": "SCATTER",
    "xaxis": {"key": "total_seconds", "type": "METRIC"},
    "yaxis": {"key": "test_roc_auc", "type": "METRIC"},
}


def key_of(kind: RunKind | None, parent: str = "") -> str:
    """The key of the view of all runs, or of those of a parent."""
    return f"cxr-{kind}-{parent[:12]}" if kind else "cxr-runs"


def name_of(kind: RunKind | None, parent: str = "") -> str:
    """The name of that view in the menu."""
    return f"cxr: {kind} {parent[:8]}" if kind else "cxr: all runs"


def state_of(kind: RunKind | None, parent: str = "", rates: Sequence[str] = ()) -> dict[str, Any]:
    """The state of the page: all runs, or the children of a comparison, a search (of `rates`) or a cross-validation.

    A comparison groups its runs by strategy: the table shows means over seeds, and opens on a click. Its ensembles are
    left out, as they would enter the means; its report has them.
    """
    if kind is None:
        params = ("train.strategy", "train.arch", "train.seed")
        return _page(_columns(params, _RUN), [_LOSSES, _QUALITY, _COST], order="test_roc_auc")
    inside = f"tags.`{Tag.PARENT}` = '{parent}'"
    if kind is RunKind.SEARCH:
        chart = {
            "type": "PARALLEL",
            "selectedParams": list(rates),
            "selectedMetrics": ["val_loss"],
            "showAllRuns": True,
        }
        columns = _columns(rates, ("val_loss", "val_roc_auc"))
        return _page(columns, [chart, {**_LOSSES, "runsCountToCompare": 20}], "val_loss", inside, falling=False)
    if kind is RunKind.CROSSVAL:
        names = tuple(f"fold_{name}" for name in ("roc_auc", "accuracy", "recall", "specificity"))
        columns = _columns(("train.fold",), (*names, "total_seconds"))
        return _page(columns, [_LOSSES, {"type": "BAR", "metricKey": "fold_roc_auc"}], "fold_roc_auc", inside)
    own = [name for name in _RUN if not name.endswith(("_low", "_high"))]  # means of bounds would bound nothing
    columns = _columns(("train.strategy", "train.arch", "train.seed"), own)
    by_strategy = {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "train.strategy"}]}
    members = f"{inside} AND tags.`{Tag.KIND}` = '{RunKind.MEMBER}'"
    return _page(columns, [_QUALITY, _COST, _LOSSES], "test_roc_auc", members, by_strategy)


def _columns(params: Sequence[str], metrics: Sequence[str]) -> list[str]:
    return [*_IDENTITY, *(f"params.`{name}`" for name in params), *(f"metrics.`{name}`" for name in metrics)]


def _page(
    columns: list[str],
    charts: Sequence[Chart],
    order: str,
    search: str = "",
    groups: dict[str, Any] | None = None,
    *,
    falling: bool = True,
) -> dict[str, Any]:
    section = {"uuid": "cxr", "name": "Runs", "display": True, "isReordered": False, "deleted": False}
    return {
        "orderByKey": f"metrics.`{order}`",
        "orderByAsc": not falling,
        "searchFilter": search,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "FIRST_20_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "groupBy": groups,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "compareRunSections": [{**section, "isGenerated": False}],
        "compareRunCharts": [_chart(number, chart) for number, chart in enumerate(charts)],
    }


def _chart(number: int, chart: Chart) -> Chart:
    common = {"uuid": f"cxr-{number}", "metricSectionId": "cxr", "isGenerated": False, "deleted": False}
    line = {"scaleType": "linear", "xAxisKey": "step", "xAxisScaleType": "linear", "selectedXAxisMetricKey": ""}
    smooth = {"lineSmoothness": 0, "useGlobalLineSmoothing": False, "useGlobalXaxisKey": False}
    return {**common, "runsCountToCompare": 10, **(line | smooth if chart["type"] == "LINE" else {}), **chart}


def saved_view(experiment_id: str, key: str, state: dict[str, Any], name: str) -> str:
    """Write a view; returns the end of its link, that of the plain page where it cannot be written.

    It is in the menu under its name, unless many are.
    """
    import mlflow

    client = mlflow.MlflowClient()
    try:
        with store_errors():
            tags = client.get_experiment(experiment_id).tags
            text = _text(state, name if _has_room(tags, f"{TAG}{key}") else None)
            if len(text) > LONGEST:
                raise ValueError(f"view {key}: {len(text)} characters, more than MLflow keeps in a tag")
            client.set_experiment_tag(experiment_id, f"{TAG}{key}", text)
    except UserError:  # such as no permission; the link then opens the page as MLflow does
        return f"runs?{OPENS}"
    return f"runs?viewStateShareKey={key}&{OPENS}"


def _text(state: dict[str, Any], name: str | None) -> str:
    """The tag. A view with a name has its state as text; versions of MLflow before that read the state's own keys."""
    if name is None:
        return _json(state)
    now = int(1000 * time.time())
    return _json({**state, "name": name, "createdAt": now, "updatedAt": now, "state": _json(state)})


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))


def _has_room(tags: Mapping[str, str], own: str) -> bool:
    """Whether few enough other views are in the menu."""
    return sum(key.startswith(TAG) and key != own and '"createdAt"' in text for key, text in tags.items()) < MOST
