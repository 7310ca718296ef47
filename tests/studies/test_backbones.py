"""Comparing backbones under one strategy, on tiny phantoms."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pandas as pd
import pytest
from narrow import ARCH
from newest import newest_parent
from placeholder import leave_plots_out
from small import quiet, small

from cxr.config import CompareConfig, configure
from cxr.errors import UserError
from cxr.evaluation.paired import Subject
from cxr.evaluation.verdict_text import sentences
from cxr.studies.compare import compare_runs, compare_tracked, load_run, notes
from cxr.tracking.nested import children
from cxr.tracking.reading import LoggedRun

OTHER = "narrow_densenet"
Compared = tuple[LoggedRun, list[str]]


@pytest.fixture(scope="module")
def compared(store: str, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """One comparison of two backbones with two seeds: its parent and the verdict."""
    options = {"bootstrap": 20, "register": "none", "strategies": "frozen", "archs": f"{ARCH},{OTHER}", "seeds": 2}
    mlflow.set_tracking_uri(store)
    with pytest.MonkeyPatch.context() as patch:
        leave_plots_out(patch, studies_too=False)
        config = small(CompareConfig, phantoms, **options, cache_dir=str(tmp_path_factory.mktemp("cache")))
        lines = sentences(compare_tracked(config, quiet))
    return newest_parent(), lines


def test_there_is_a_child_for_each_backbone_and_seed(compared: Compared, in_store: str) -> None:
    parent, _ = compared
    runs = children(parent.run_id)
    assert [run.name for run in runs] == [f"{ARCH}-s0", f"{OTHER}-s0", f"{ARCH}-s1", f"{OTHER}-s1"]
    assert {run.tags["arch"] for run in runs} == {ARCH, OTHER}
    assert {run.status for run in [parent, *runs]} == {"FINISHED"}


def test_tables_report_and_verdict_are_by_backbone(compared: Compared, in_store: str) -> None:
    parent, lines = compared
    table = pd.read_csv(f"{parent.artifact_uri}/comparison/backbones.csv").set_index("backbone")
    assert list(table.index) == [ARCH, OTHER]
    assert list(table["seeds"]) == [2, 2]
    page = mlflow.artifacts.load_text(f"{parent.artifact_uri}/comparison/report.html")
    assert "Backbones compared" in page
    assert "strateg" not in page.replace("strategy frozen", "")
    assert lines[-1].startswith("of the backbones, narrow_")
    assert parent.tags["verdict"] == lines[-1]
    assert not any("claim" in line for line in lines)


def test_weights_and_code_are_no_warning(compared: Compared, in_store: str) -> None:
    runs = [load_run(run.run_id, Subject.BACKBONE) for run in children(compared[0].run_id)]
    assert not any(line.startswith("WARNING") for line in notes(runs, 0.01))


def test_finished_runs_of_several_backbones_are_compared_by_backbone(compared: Compared, in_store: str) -> None:
    runs = children(compared[0].run_id)
    verdict = compare_runs([run.run_id for run in runs], 0.01, quiet)
    assert verdict.claim is None
    assert verdict.seeds == {ARCH: 2, OTHER: 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "under one strategy, not several"),
        ({"strategies": "frozen,full"}, "name one, such as --strategies partial"),
        ({"strategies": "full", "archs": "resnet18,vgg16"}, "vgg16 unknown; list some of resnet18"),
        ({"strategies": "full", "archs": "swin_t,swin_t"}, "at most once"),
        ({"strategies": "full", "archs": "swin_t,vit_b_16", "image_size": 100}, "vit_b_16 takes multiples of 16"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(CompareConfig, {"archs": "resnet18,densenet121", **options})
