"""A logged or registered model on other images, as a run of its own."""

from __future__ import annotations

import torch

from cxr import registry
from cxr.data.audit import list_bad
from cxr.data.dataset import eval_batches, make_split
from cxr.data.index import fingerprint, index_for_evaluation
from cxr.data.store import open_store
from cxr.errors import UserError
from cxr.evaluate import Report, evaluate, predictions_table
from cxr.inputs import bad_paths
from cxr.results import Say, log_report
from cxr.runtime import cache_folder
from cxr.tracking import open_run
from cxr.train import infer


def evaluate_tracked(uri: str, data_dir: str, bootstrap: int, cache_dir: str, say: Say = print) -> Report:
    """Evaluate a logged or registered model on other images, in an MLflow run of its own.

    The figures are named `external_…` for a flat folder of two classes, `test_…` for the test split of a Kaggle-shaped
    one. Raises `UserError` for a model or a folder that cannot be used, or unreadable images.
    """
    predictor = registry.load(uri)
    card = predictor.card
    root, table, split = index_for_evaluation(data_dir)
    files = [root / path for path in table["path"]]
    store = open_store(files, list(table["digest"]), card.image_size, card.resize, cache_folder(cache_dir))
    if bad := bad_paths(table, store):
        raise UserError(f"{len(bad)} unreadable image(s) in {root}: {list_bad(bad)}; mend or remove them")
    table = table.assign(split=split)
    logits, _ = infer(predictor.model, eval_batches(make_split(table, store, split), 32, torch.device("cpu")))
    predictions = predictions_table(table, logits.numpy(), card.threshold, card.calibration)
    report = evaluate(predictions, split, card.threshold, bootstrap)
    with open_run(f"evaluate-{root.name}") as tracker:
        tracker.params({"evaluate.model": uri, "evaluate.data_dir": str(root), "evaluate.bootstrap": str(bootstrap)})
        tracker.tags({"strategy": card.strategy, "data_fingerprint": fingerprint(table)})
        tracker.dataset(table, str(root), f"{fingerprint(table)}-{split}", "evaluation")
        log_report(tracker, report, f"{uri} on {root.name}")
        tracker.metrics(report.figures())
        say("\n".join([report.text(), *(f"look: {where}" for where in tracker.where())]))
    return report
