"""Parents: what the same command, given again after a kill, makes of them."""

from __future__ import annotations

import mlflow

from cxr.tracking.nested import join_parent, log_once, open_parent


def test_metrics_of_a_parent_are_logged_once(in_store: str) -> None:
    parent = open_parent("comparison", {}, {"train.seed": "0"})
    log_once(join_parent(parent), {"a": 1.0})  # and is killed
    log_once(join_parent(parent), {"a": 1.0, "b": 2.0})
    logged = {name: mlflow.MlflowClient().get_metric_history(parent, name) for name in ("a", "b")}
    assert {name: [each.value for each in history] for name, history in logged.items()} == {"a": [1.0], "b": [2.0]}


def test_a_parent_that_was_killed_before_it_had_its_parameters_gets_them(in_store: str) -> None:
    parent = open_parent("comparison", {}, {})
    assert open_parent("comparison", {}, {"train.seed": "0"}, parent) == parent
    assert open_parent("comparison", {}, {"train.seed": "0", "train.threads": "2"}, parent) == parent
    assert mlflow.get_run(parent).data.params == {"train.seed": "0"}
