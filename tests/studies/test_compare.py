"""Comparisons, cross-validation and verification, on tiny phantoms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from command import run_main
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from newest import newest_parent
from placeholder import leave_plots_out
from small import quiet, small

from cxr.config import CommandConfig, CompareConfig, CrossvalConfig, TrainConfig, TuneConfig, configure
from cxr.data.load import read_data
from cxr.errors import InUseError, UserError
from cxr.evaluation.verdict_text import sentences
from cxr.runs import train as pipeline
from cxr.runs.result import RunResult
from cxr.runs.verify import verify
from cxr.studies.compare import compare_runs, compare_tracked, load_run, notes
from cxr.studies.crossval import crossval_tracked
from cxr.tracking.nested import children
from cxr.tracking.reading import LoggedRun, RunKind

Finished = tuple[TrainConfig, RunResult, Run]
Compared = tuple[LoggedRun, list[str], list[str]]


@pytest.fixture
def config(in_store: str, phantoms: Path) -> CompareConfig:
    """A comparison that takes seconds."""
    return small(CompareConfig, phantoms, bootstrap=20, register="none", strategies="frozen,partial", seeds=2)


@pytest.fixture(scope="module")
def compared(store: str, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """One comparison: its parent, the verdict, and what it said."""
    cache = str(tmp_path_factory.mktemp("cache"))
    options = {"bootstrap": 20, "register": "none", "strategies": "frozen,partial", "seeds": 2, "cache_dir": cache}
    said: list[str] = []
    mlflow.set_tracking_uri(store)
    with pytest.MonkeyPatch.context() as patch:
        leave_plots_out(patch, studies_too=False)
        lines = sentences(compare_tracked(small(CompareConfig, phantoms, **options), said.append))
    return newest_parent("comparison"), lines, said


def test_a_comparison_has_children_tables_figures_report_and_verdict(compared: Compared, in_store: str) -> None:
    parent, lines, said = compared
    runs = children(parent.run_id)
    assert [run.name for run in runs] == ["frozen-s0", "partial-s0", "frozen-s1", "partial-s1"]
    assert {run.status for run in [parent, *runs]} == {"FINISHED"}
    table = pd.read_csv(f"{parent.artifact_uri}/comparison/strategies.csv").set_index("strategy")
    expected = np.mean([run.metrics["test_roc_auc"] for run in runs if run.tags["strategy"] == "partial"])
    assert table.loc["partial", "roc_auc"] == pytest.approx(expected)
    assert {"parameters_trained", "total_seconds", "images_per_second", "val_test_gap"} <= set(table.columns)
    names = {file.path.split("/")[1] for file in MlflowClient().list_artifacts(parent.run_id, "comparison")}
    assert {"report.html", "pairs.csv", "roc.png", "cost.png", "differences.png", "confusion.png"} <= names
    assert "the claim that partial" in lines[-1]
    assert parent.tags["verdict"] == lines[-1]
    assert parent.tags["mlflow.note.content"].startswith("\n\n".join(lines))
    assert "compare-runs?runs=" in said[-1]
    assert [run.metrics["test_uses_before"] for run in runs] == sorted(run.metrics["test_uses_before"] for run in runs)


def test_an_interrupted_comparison_reuses_finished_runs(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = config.replace(seed=10)
    ended = pipeline.log_end

    def breaks(*arguments: object) -> str:
        if "partial-s10" in str(mlflow.active_run().info.run_name):  # type: ignore[union-attr]
            raise KeyboardInterrupt
        return ended(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "log_end", breaks)
        with pytest.raises(KeyboardInterrupt):
            compare_tracked(fresh, quiet)
    parent = newest_parent("comparison")
    assert parent.status == "KILLED"
    before = {run.name: run.run_id for run in children(parent.run_id)}
    said: list[str] = []
    compare_tracked(fresh, said.append)
    after = {run.name: run.run_id for run in children(parent.run_id)}
    assert newest_parent("comparison").run_id == parent.run_id
    assert before.items() <= after.items()
    assert len(after) == 4
    assert any("frozen-s10: already finished" in line for line in said)


def test_a_comparison_on_another_host_is_not_joined_and_reuse_gb_is_not_part_of_it(config: CompareConfig) -> None:
    fresh = config.replace(seed=20, seeds=1)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(pipeline, "log_end", lambda *arguments: (_ for _ in ()).throw(UserError("disk full")))
        with pytest.raises(UserError, match="disk full"):
            compare_tracked(fresh, quiet)
    parent = newest_parent("comparison").run_id
    client = MlflowClient()
    client.update_run(parent, status="RUNNING")
    client.set_tag(parent, "cxr.host", "elsewhere")
    with pytest.raises(InUseError, match=rf"{parent} is running on elsewhere.*set_terminated"):
        compare_tracked(fresh, quiet)
    assert LoggedRun.open(parent).status == "RUNNING"
    client.set_terminated(parent, "KILLED")
    (interrupted,) = [run for run in children(parent) if run.status == "FAILED"]
    assert [run.status for run in children(parent)].count("SCHEDULED") == 1  # not begun yet
    compare_tracked(fresh.replace(reuse_gb=0.001), quiet)
    assert newest_parent("comparison").run_id == parent
    outcomes = {run.run_id: run.status for run in children(parent)}
    assert outcomes.pop(interrupted.run_id) == "FAILED"  # recorded with a different reuse_gb
    assert list(outcomes.values()) == ["FINISHED"] * 2


def test_a_child_whose_checkpoint_was_pruned_is_restarted(config: CompareConfig, own_cache: Path) -> None:
    fresh = config.replace(seed=30, seeds=1)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(pipeline, "log_end", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            compare_tracked(fresh, quiet)
    parent = newest_parent("comparison").run_id
    (gone,) = [run for run in children(parent) if run.status == "KILLED"]
    shutil.rmtree(own_cache / "runs" / gone.run_id)
    compare_tracked(fresh, quiet)
    assert newest_parent("comparison").status == "FINISHED"
    assert LoggedRun.open(gone.run_id).status == "KILLED"
    with pytest.raises(UserError, match=r"is a comparison, not a training run; run its `cxr compare` command again"):
        client = MlflowClient()
        client.update_run(parent, status="FAILED")
        client.delete_tag(parent, "cxr.outcome")
        pipeline.run_tracked(TrainConfig(), quiet, parent)
    MlflowClient().set_terminated(parent, "FINISHED")


def test_the_seeds_of_each_strategy_become_an_ensemble_that_is_registered(in_store: str, phantoms: Path) -> None:
    options = {"strategies": "frozen", "seeds": 2, "ensemble": True, "register": "seeds-together"}
    said: list[str] = []
    compare_tracked(small(CompareConfig, phantoms, **options), said.append)
    parent = newest_parent("comparison")
    (whole,) = [run for run in children(parent.run_id) if run.kind is RunKind.ENSEMBLE]
    assert whole.status == "FINISHED"
    assert len(whole.params["ensemble.runs"].split()) == 2
    found = MlflowClient().search_model_versions("name = 'seeds-together'")
    assert sorted(version.tags["members"] for version in found) == ["1", "1", "2"]
    assert any("ensemble of 2 (frozen)" in line for line in said)
    page = mlflow.artifacts.load_text(f"{parent.artifact_uri}/comparison/report.html")
    assert "frozen, 2 runs" in page
    assert f"{whole.metric('val_loss'):.4f}</td>" in page
    MlflowClient().update_run(parent.run_id, status="KILLED")  # as if stopped among the ensembles
    compare_tracked(small(CompareConfig, phantoms, **options), quiet)
    assert newest_parent("comparison").run_id == parent.run_id
    assert len(children(parent.run_id)) == 3
    with pytest.raises(UserError, match="--ensemble true: needs two or more seeds"):
        small(CompareConfig, phantoms, seeds=1, ensemble=True)


def test_runs_that_differ_in_more_than_the_seed_are_named(compared: Compared, in_store: str) -> None:
    runs = [load_run(run.run_id) for run in children(compared[0].run_id)]
    assert not [line for line in notes(runs, 0.01) if "WARNING" in line]
    odd = replace(runs[0], settings={**runs[0].settings, "arch": "resnet50"})
    remarks = notes([odd, *runs[1:]], 0.01)
    assert any(f"WARNING: the runs of {odd.strategy} differ not only in the seed: arch" in line for line in remarks)
    longer = [replace(r, settings={**r.settings, "epochs": "7"}) if r.strategy == "frozen" else r for r in runs]
    assert any(line.startswith("epochs: frozen 7, ") for line in notes(longer, 0.01))
    assert "evaluated 0 times" in " ".join(
        notes([replace(r, cost={**r.cost, "test_uses_before": i}) for i, r in enumerate(runs)], 0.01)
    )


def test_finished_runs_are_compared_and_others_rejected(compared: Compared, in_store: str) -> None:
    ids = [run.run_id for run in children(compared[0].run_id)]
    verdict = compare_runs(ids, 0.01, quiet)
    assert verdict == compare_runs(ids, 0.01, quiet)
    with pytest.raises(UserError, match="duplicate runs"):
        compare_runs([ids[0], ids[0]], 0.01, quiet)
    with pytest.raises(UserError, match=r"different images|duplicate runs"):
        moved = replace(load_run(ids[0]), test=load_run(ids[0]).test.iloc[::-1].reset_index(drop=True))
        from cxr.evaluation.paired import require_same_images

        require_same_images([load_run(ids[1]), moved])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strategies", "frozen,best"), "--strategies frozen,best"),
        (("--strategies", "frozen,frozen"), "at most once"),
        (("--epochs-each", "full:3"), "--epochs-each full:3"),
        (("--seeds", "0"), "--seeds 0"),
        (("--strategy", "full"), "--strategy"),
        (("--margin", "0"), "--margin 0"),
        (("--runs", "0" * 32), "0" * 32),
    ],
)
def test_invalid_input_of_a_comparison_is_one_line(
    in_store: str,
    options: tuple[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(monkeypatch, "compare", *options) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_epochs_of_individual_strategies(config: CompareConfig) -> None:
    own = config.replace(epochs=7, epochs_each="full=3,gradual=2")
    assert own.epochs_of() == {"frozen": 7, "partial": 7, "full": 3, "gradual": 2}


def test_crossval_holds_out_each_image_once_and_never_uses_the_test_folder(
    in_store: str, phantoms: Path, studies_save: None
) -> None:
    folds = small(CrossvalConfig, phantoms, strategy="frozen", bootstrap=20, folds=3, val_fraction=0.3)
    table = crossval_tracked(folds, quiet)
    parent = newest_parent("crossval")
    pooled = pd.read_csv(f"{parent.artifact_uri}/crossval/out_of_fold_predictions.csv")
    manifest = read_data(folds.train).manifest
    assert sorted(pooled["path"]) == sorted(manifest.loc[manifest["official"] != "test", "path"])
    assert not pooled["path"].str.startswith("test/").any()
    assert len(table) == 3
    assert parent.metrics["fold_roc_auc_mean"] == pytest.approx(table["roc_auc"].mean())
    for run in children(parent.run_id):
        rows = pd.read_csv(f"{run.artifact_uri}/data/manifest.csv")
        assert set(rows["split"]) == {"train", "val", "fold"}
        assert rows.groupby("group")["split"].nunique().max() == 1
        assert "fold_roc_auc" in run.metrics
        assert not [name for name in run.metrics if name.startswith("test_") and name != "test_uses_before"]
        assert run.tags["registered"] == "not registered"
    assert len(set(table["roc_auc"])) > 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: configure(CompareConfig, {"fold": "1/5"}),
        lambda: configure(CompareConfig, {"resume": "x"}),
        lambda: configure(CompareConfig, {"strategy": "full"}),
        lambda: CompareConfig(margin=0),
        lambda: configure(CrossvalConfig, {"fold": "1/5"}),
        lambda: configure(TuneConfig, {"fold": "1/5"}),
        lambda: TuneConfig(pruner="WilcoxonPruner"),
    ],
)
def test_options_that_would_be_ignored_are_rejected(make: Callable[[], CommandConfig]) -> None:
    with pytest.raises(UserError, match="--"):
        make()


@pytest.mark.parametrize("fold", ["0/3", "4/3", "2/1", "x", "1/999"])
def test_an_invalid_fold_is_rejected(fold: str) -> None:
    with pytest.raises(UserError, match="--fold"):
        TrainConfig(fold=fold)


def test_verify_accepts_an_unaltered_run_by_id_and_by_model(
    finished: Finished, in_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = finished[1].run_id
    findings = verify(run_id)
    assert [finding.line() for finding in findings if not finding.ok] == []
    assert len(findings) == 9
    version = MlflowClient().search_model_versions(f"run_id = '{run_id}'")[0]
    assert run_main(monkeypatch, "models", "verify", f"models:/{version.name}/{version.version}") == 0
    assert "metrics equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    "altered", ["metric", "predictions", "threshold", "rows", "epoch", "stressed", "familiarity", "abstain"]
)
def test_verify_fails_on_altered_metrics(
    config: CompareConfig, altered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pipeline.run_tracked(replace(config.train, strategy="frozen"), quiet)
    client = MlflowClient()
    if altered == "metric":
        client.log_metric(result.run_id, "test_accuracy", 0.99, step=99)
    elif altered == "stressed":
        client.log_metric(result.run_id, "stressed_val_accuracy", 1.01, step=99)
    elif altered == "epoch":
        client.log_metric(result.run_id, "val_loss", 0.001, step=50)
    elif altered == "threshold":
        client.log_metric(result.run_id, "chosen_threshold", 0.123, step=99)
    else:
        table = LoggedRun.open(result.run_id).predictions("test")
        if altered in ("familiarity", "abstain"):
            table[altered] = 50.0 + table[altered] if altered == "familiarity" else 1 - table[altered]
        else:
            table.loc[0, ["logit_normal", "logit_pneumonia"]] = [0.0, 5.0]
        table = table.iloc[1:] if altered == "rows" else table
        client.log_text(result.run_id, table.to_csv(index=False), "tables/test_predictions.csv")
    assert run_main(monkeypatch, "models", "verify", result.run_id) == 1
    output = capsys.readouterr().out
    assert "WARN" in output
    expected = {"metric": "test_accuracy is logged as 0.99", "threshold": "threshold", "predictions": ".jpeg"}
    expected |= {
        "rows": "not the",
        "stressed": "stressed_val_accuracy is logged as 1.01",
        "epoch": "val_loss of epoch 50",
        "familiarity": ": familiarity ",
        "abstain": "another probability or decision",
    }
    assert expected[altered] in output


def test_verify_reports_a_run_of_a_different_commit(
    finished: Finished, in_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = finished[1].run_id
    monkeypatch.setattr("cxr.runs.verify.git_commit", lambda: "another")
    assert verify(run_id)[0].ok
    monkeypatch.setattr("cxr.runs.verify._differences", lambda *values: ["test_accuracy is logged as 2, and is 1"])
    assert "and this is another; test_accuracy" in verify(run_id)[0].line()


def test_verify_reports_different_images(finished: Finished, phantoms: Path, tmp_path: Path, in_store: str) -> None:
    copy = Path(shutil.copytree(phantoms, tmp_path / "other"))
    next((copy / "test" / "NORMAL").iterdir()).unlink()
    found = {finding.check: finding for finding in verify(finished[1].run_id, str(copy))}
    assert not found["images, labels and splits"].ok
    assert json.dumps(found["images, labels and splits"].detail)


@pytest.mark.parametrize("target", ["0" * 32, "models:/nothing@champion", "runs:/x/model"])
def test_verify_of_an_unknown_target_is_a_user_error(target: str, in_store: str) -> None:
    with pytest.raises(UserError):
        verify(target)
