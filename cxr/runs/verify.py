"""Verification of a run: recomputes metrics from the logged predictions, predictions from model and data, and the best
epoch from the logged epochs. Metrics of epochs other than the best cannot be checked: their weights are not kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from cxr.audit.checks import Finding
from cxr.config import TrainConfig
from cxr.data.batches import make_split, stressed_parts
from cxr.data.load import Data, read_data
from cxr.errors import UserError
from cxr.evaluation.calibration import fit
from cxr.evaluation.predictions import is_binary, logits_of, matrix_of, predictions_table
from cxr.evaluation.report import certainties_of, evaluate, implied_prevalence, weighted_loss
from cxr.network.freezing import count_parameters
from cxr.runs.ensemble import member_logits
from cxr.runs.reports import chosen_threshold, limit_of, stressed_validation
from cxr.serving.predictor import Predictor
from cxr.tracking import registry
from cxr.tracking.lifecycle import git_commit
from cxr.tracking.reading import LoggedRun, RunKind, Tag, source_run
from cxr.training.loop import class_weights

# Tolerances: metrics from the same table; probabilities with another batch size, memory format and precision;
# metrics measured in bf16 or fp16 during training and in fp32 here.
EXACT, CLOSE, LOOSE = 1e-9, 1e-3, 0.01
FAMILIAR = 2.0  # percent
_SHOWN = 5


def verify(target: str, data_dir: str | None = None, cache_dir: str | None = None) -> list[Finding]:
    """Check a run, or the run behind a registered model. `data_dir` names the images if they have moved.

    Raises `UserError` when there is no such run or model, or the images cannot be read.
    """
    run, uri = _run_of(target)
    config = run.config()
    config = replace(config, data_dir=data_dir or config.data_dir, cache_dir=cache_dir or config.cache_dir)
    held = "fold" if config.fold_numbers() else "test"
    val, test = (run.predictions(split) for split in ("val", held))
    predictor = registry.load(uri)
    share = implied_prevalence(predictor.card.calibration, float(val["label"].mean()))
    sizes = {
        "parameters_total": count_parameters(predictor.model),
        "parameters_trained": count_parameters(predictor.model, config.phases[-1].trainable),
    }
    findings = [_metrics(run, config, val, test, held, share, sizes), _choices(run, config, val, predictor)]
    findings += [_decisions(table, split, predictor) for split, table in (("val", val), (held, test))]
    whole = run.kind is RunKind.ENSEMBLE
    findings.append(_members(run, {"val": val, held: test}) if whole else _best_epoch(run, config, val))
    return findings + _from_images(run, config, {"val": val, held: test}, predictor)


def _run_of(target: str) -> tuple[LoggedRun, str]:
    """(the run, the URI of its model) of a run's id or a model's URI."""
    if "/" not in target:
        run = LoggedRun.open(target)
        return run, f"models:/{registry.model_of(run)}"
    if not target.startswith("models:/"):
        raise UserError(f"{target}: give a run's id, or models:/NAME@ALIAS")
    run_id = source_run(target)
    if run_id is None:
        raise UserError(f"{target}: no such model, or the run that logged it is unknown")
    return LoggedRun.open(run_id), target


def _finding(check: str, wrong: list[str], fine: str) -> Finding:
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return Finding(check, not wrong, "; ".join(wrong[:_SHOWN]) + more if wrong else fine)


def _metrics(
    run: LoggedRun,
    config: TrainConfig,
    val: pd.DataFrame,
    test: pd.DataFrame,
    held: str,
    share: float,
    sizes: dict[str, int],
) -> Finding:
    threshold = run.threshold
    again = evaluate(val, "val", threshold, config.bootstrap).metrics()
    again |= evaluate(test, held, threshold, config.bootstrap, share).metrics()
    again |= {"val_test_gap_roc_auc": again["val_roc_auc"] - again[f"{held}_roc_auc"], **sizes}
    tabled = run.tabled_metrics()
    wrong = _differences(run.every_metric(), again)
    wrong += _differences(tabled, {name: value for name, value in again.items() if name in tabled})
    made, here = run.commit, git_commit()
    if wrong and made != here:  # whose definitions of metrics may differ
        wrong.insert(0, f"the run was made by commit {made}, and this is {here}")
    return _finding("metrics from the logged predictions", wrong, f"{len(again)} metrics equal")


def _differences(logged: Mapping[str, float], again: Mapping[str, float], tolerance: float = EXACT) -> list[str]:
    return [
        f"{name} is logged as {logged.get(name, float('nan')):.6f}, recomputed {value:.6f}"
        for name, value in again.items()
        if not np.isclose(logged.get(name, float("nan")), value, rtol=tolerance, atol=tolerance)
    ]


def _tolerance(run: LoggedRun) -> float:
    """For metrics that were measured in another precision, or on a GPU, which rounds views differently."""
    on_cpu = run.tags.get(Tag.DEVICE, "cpu").startswith("cpu")  # ensembles of earlier versions do not say; on the CPU
    return CLOSE if on_cpu and run.tags.get(Tag.PRECISION) == "fp32" else LOOSE


def _members(run: LoggedRun, tables: Mapping[str, pd.DataFrame]) -> Finding:
    """Recompute the logits of an ensemble from those that its members logged."""
    runs, wrong = [LoggedRun.open(run_id) for run_id in run.params["ensemble.runs"].split()], []
    for split, table in tables.items():
        if not np.allclose(member_logits(runs, split), logits_of(table), rtol=1e-6, atol=1e-6):
            wrong.append(f"{split}: the logits are not those of the members")
    return _finding("logits from those of the members", wrong, f"{len(runs)} members")


def _best_epoch(run: LoggedRun, config: TrainConfig, val: pd.DataFrame) -> Finding:
    """Which epoch was the best, from all that were logged, and its loss from the predictions of its checkpoint."""
    losses, judged = (run.history(name) for name in ("val_loss", config.select))
    best = min(losses, key=lambda epoch: (judged.get(epoch, math.inf), epoch), default=-1)
    named = run.tags.get(Tag.BEST_EPOCH, "nothing")
    wrong = [] if named == str(best) else [f"best_epoch is logged as {named}, recomputed {best}"]
    weights = torch.tensor([run.number(f"class_weight.{name}") for name in run.task.keys])
    logits = torch.tensor(logits_of(val))
    name = f"val_loss of epoch {best}"
    again = {name: weighted_loss(logits, torch.tensor(val["label"].to_numpy(np.int64)), weights)}
    wrong += _differences({name: losses.get(best, math.nan)}, again, _tolerance(run))
    return _finding("best epoch from all that were logged", wrong, f"epoch {best} of {len(losses)}, and its val_loss")


def _choices(run: LoggedRun, config: TrainConfig, val: pd.DataFrame, predictor: Predictor) -> Finding:
    """Recompute calibration and threshold from validation."""
    labels, logits = val["label"].to_numpy(np.int64), logits_of(val)
    fitted = fit(config.calibration, logits, labels)
    threshold = chosen_threshold(config, labels, fitted.probabilities(logits))
    card = predictor.card
    again = {"slope": fitted.slope, "offset": fitted.offset, "threshold": threshold}
    kept = {"slope": card.calibration.slope, "offset": card.calibration.offset, "threshold": card.threshold}
    if is_binary(val):
        again["logged threshold"], kept["logged threshold"] = threshold, run.threshold
    if "abstain" in val:
        again["certainty limit"] = limit_of(val, threshold, config.abstain)
        kept["certainty limit"] = card.certainty_limit
    return _finding("calibration and threshold from validation", _differences(kept, again), "the model carries them")


def _decisions(table: pd.DataFrame, split: str, predictor: Predictor) -> Finding:
    """Recompute probabilities, decisions and abstentions from the logged logits with what the model carries."""
    card = predictor.card
    again = predictions_table(table, logits_of(table), card.threshold, card.calibration, card.task)
    off = ~np.isclose(matrix_of(again), matrix_of(table), rtol=EXACT, atol=EXACT).all(1)
    off |= (again["decision"] != table["decision"]).to_numpy()
    if "abstain" in table:
        off |= (certainties_of(again, card.threshold) < card.certainty_limit) != table["abstain"].to_numpy()
    wrong = [f"{path}: what its logits give is another probability or decision" for path in table.loc[off, "path"]]
    return _finding(f"{split} decisions from the logged logits", wrong, f"{len(table)} equal")


def _from_images(
    run: LoggedRun, config: TrainConfig, tables: Mapping[str, pd.DataFrame], predictor: Predictor
) -> list[Finding]:
    """Check the images by digest, label and split, then run them through the model."""
    data = read_data(config)
    recorded = run.tags.get(Tag.DATA_FINGERPRINT)
    same = [] if recorded == data.fingerprint else [f"fingerprint was {recorded}, now {data.fingerprint}"]
    findings = [_finding("images, labels and splits", same, f"fingerprint {data.fingerprint}")]
    if same:
        return findings
    findings += [_predictions(data, split, table, predictor) for split, table in tables.items()]
    return [*findings, _stressed(run, config, data, predictor)]


def _predictions(data: Data, split: str, table: pd.DataFrame, predictor: Predictor) -> Finding:
    check, part = f"{split} predictions from model and data", data.part(split)
    if list(part["digest"]) != list(table["digest"]):
        return _finding(
            check, [f"the table has {len(table)} images, the split {len(part)}, or they are not the same"], ""
        )
    images = [data.store.images[data.store.rows[digest]] for digest in table["digest"]]
    predicted = predictor.predict(images)
    again, logged = predicted["probability"].to_numpy(), table["probability"]
    gap = np.abs(again - logged.to_numpy())
    wrong = [f"{table['path'][i]}: {logged[i]:.4f}, not {again[i]:.4f}" for i in np.where(gap > CLOSE)[0]]
    wrong += _unlike(table, predicted, predictor)
    labels = part["label"].to_numpy() != table["label"].to_numpy()
    wrong += [f"{path}: another label" for path in table.loc[labels, "path"]]
    return _finding(check, wrong, f"{len(table)} images, probabilities within {gap.max():.1e}")


def _unlike(table: pd.DataFrame, predicted: pd.DataFrame, predictor: Predictor) -> list[str]:
    """The images whose familiarity is another; it goes in steps of one validation image."""
    if predictor.familiar is None or "familiarity" not in table:
        return []
    step = 100.0 / len(predictor.familiar.distances.reference)
    pairs = zip(table["path"], table["familiarity"], predicted["familiarity"], strict=True)
    return [f"{path}: familiarity {a:.1f}, not {b:.1f}" for path, a, b in pairs if abs(a - b) > FAMILIAR + step]


def _stressed(run: LoggedRun, config: TrainConfig, data: Data, predictor: Predictor) -> Finding:
    """Recompute class weights from the training labels, and the stressed validation from model and data."""
    weights = class_weights(data.part("train")["label"].to_numpy(np.int64))
    classes = data.task.classes
    named = {f"class_weight.{name}": weight for name, weight in zip(data.task.keys, weights.tolist(), strict=True)}
    logged = {name: run.number(name) for name in named}
    wrong = _differences(logged, named, 1e-6)  # the precision of the logged values
    again = stressed_validation(config, data, predictor.model)
    parts = stressed_parts(make_split(data.manifest, data.store, "val"), len(data.part("train")), config.stresses)
    # A single image on the other side of the threshold changes a count, whatever the tolerance.
    shown = sum(np.bincount(part.labels, minlength=len(classes)) for part in parts.values())
    step = len(classes) / int(np.min(shown))
    counted = {name for name in again if name.endswith(("accuracy", "recall", "specificity"))}
    for names, tolerance in ((again.keys() - counted, _tolerance(run)), (counted, max(_tolerance(run), step))):
        wrong += _differences(run.every_metric(), {name: again[name] for name in sorted(names)}, tolerance)
    gap = max(abs(run.metric(name) - value) for name, value in again.items())
    return _finding("stressed validation from model and data", wrong, f"{len(again)} metrics within {gap:.1e}")
