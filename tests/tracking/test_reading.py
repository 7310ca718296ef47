"""Metrics of runs, those that are only in a table included."""

from __future__ import annotations

import math
from io import StringIO

import mlflow
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr.tracking.reading import Artifact, LoggedRun, _metrics_of, metrics_table
from cxr.tracking.tracker import MlflowTracker

NAMES = st.sampled_from(["test_recall", "val_ece", "total_seconds", "test_prior_own"])


@given(st.dictionaries(NAMES, st.tuples(*[st.floats(-1e9, 1e9)] * 3, st.booleans()), min_size=1))
def test_a_table_of_metrics_is_read_back_as_they_were(metrics: dict[str, tuple[float, float, float, bool]]) -> None:
    flat = {name: value for name, (value, *_) in metrics.items()}
    for name, (_, low, high, bounded) in metrics.items():
        flat |= {f"{name}_low": low, f"{name}_high": high} if bounded else {}
    text = metrics_table(flat).to_csv(index=False)
    assert _metrics_of(pd.read_csv(StringIO(text))) == pytest.approx(flat, rel=1e-14)


def test_numbers_of_a_table_are_read_back_to_the_last_bit(in_store: str) -> None:
    logits = np.random.default_rng(0).normal(size=5000)
    table = pd.DataFrame({"path": ["007.png"] * len(logits), "logit": logits})
    with mlflow.start_run() as run:
        MlflowTracker(run).table(table, "tables/logits.csv")
    found = LoggedRun.open(run.info.run_id).table("tables/logits.csv")
    pd.testing.assert_frame_equal(found, table, check_exact=True)


def test_metrics_that_are_only_in_a_table_are_read_from_it(in_store: str) -> None:
    with mlflow.start_run() as run:
        tracker = MlflowTracker(run)
        every = {"test_recall": 0.75, "test_recall_low": 0.5, "test_recall_high": 1.0, "val_ece": 0.25}
        tracker.table(metrics_table(every), Artifact.METRICS)
        tracker.metrics({"test_recall": 0.75})
    found = LoggedRun.open(run.info.run_id)
    assert found.metrics == {"test_recall": 0.75}
    assert found.every_metric() == every
    assert [found.metric(name) for name in ("test_recall_low", "val_ece")] == [0.5, 0.25]
    assert math.isnan(found.metric("val_brier"))


def test_a_run_without_the_table_has_what_it_logged(in_store: str) -> None:
    with mlflow.start_run() as run:
        mlflow.log_metrics({"test_recall": 0.75, "test_recall_low": 0.5})
    found = LoggedRun.open(run.info.run_id)
    assert found.every_metric() == found.metrics == {"test_recall": 0.75, "test_recall_low": 0.5}
    assert math.isnan(found.metric("test_brier"))
