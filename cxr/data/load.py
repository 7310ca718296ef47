"""What a run starts from: images indexed, decoded and split, and the machine to compute on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from cxr.config import SYNTHETIC, TrainConfig
from cxr.data.phantoms import VERSION, write_synthetic
from cxr.data.sources import Source, read_source, require_splits
from cxr.data.splits import assign_fold, assign_splits, fingerprint
from cxr.data.store import Store, open_store
from cxr.errors import UserError
from cxr.storage import Cache
from cxr.task import KAGGLE, Task
from cxr.threshold_rule import RuleKind


@dataclass(frozen=True, slots=True)
class Data:
    """A data set ready to train on: the manifest (bad images left out), the decoded images, and their origin."""

    manifest: pd.DataFrame
    store: Store
    bad: dict[str, str]
    root: Path
    fingerprint: str
    synthetic: bool
    task: Task = KAGGLE
    remarks: tuple[str, ...] = ()  # about the source, for people
    held_out: str = "test"  # the split that reports: `fold` in a cross-validation

    def part(self, split: str) -> pd.DataFrame:
        """The manifest's rows of one split."""
        return self.manifest[self.manifest["split"] == split]

    def without(self, split: str) -> Data:
        """The same data, with no row of that split in the manifest: nothing can be made of it."""
        return replace(self, manifest=self.manifest[self.manifest["split"] != split].reset_index(drop=True))


def read_data(config: TrainConfig) -> Data:
    """Index, decode and split. Raises `UserError` for a folder or files that cannot be used."""
    cache = Cache.open(config.cache_dir)
    synthetic, source = config.data_dir == SYNTHETIC, source_of(config)
    root, table, task = source.root, source.table, source.task
    require_possible(config, task)
    files = [root / path for path in table["path"]]
    store = open_store(files, list(table["digest"]), config.image_size, config.resize, cache)
    bad = bad_paths(table, store)
    table = reject_bad(table, bad, config.on_bad_image)
    require_splits(table, config.splits)
    fold = config.fold_numbers()
    if fold:
        manifest = assign_fold(table, fold, config.val_fraction, config.split_seed, task)
    else:
        given = "official" if config.splits != "auto" else config.val_split
        manifest = assign_splits(table, given, config.val_fraction, config.split_seed, task)
    shapes = [store.shapes[digest] for digest in manifest["digest"]]
    manifest[["width", "height", "mode"]] = pd.DataFrame(shapes, index=manifest.index)
    held_out = "fold" if fold else "test"
    return Data(manifest, store, bad, root, fingerprint(manifest), synthetic, task, source.remarks, held_out)


def require_possible(config: TrainConfig, task: Task) -> None:
    """Raise `UserError` for what only two classes can have, before anything is trained."""
    count = len(task.classes)
    if not task.binary and config.threshold_rule.kind is not RuleKind.YOUDEN:
        raise UserError(f"--threshold {config.threshold}: is for two classes, not {count}; leave it out")
    if not task.binary and config.calibration == "platt":
        raise UserError(f"--calibration platt: is for two classes, not {count}; use temperature or none")


def source_of(config: TrainConfig) -> Source:
    """The images of `data_dir`; phantoms are made if they are missing."""
    if config.data_dir != SYNTHETIC:
        return read_source(config, config.data_dir)
    return read_source(config, write_synthetic(Cache.open(config.cache_dir).phantoms(VERSION)))


def bad_paths(table: pd.DataFrame, store: Store) -> dict[str, str]:
    """Path -> reason, of the images that the store could not decode."""
    return {p: store.bad[d] for p, d in zip(table["path"], table["digest"], strict=True) if d in store.bad}


def list_bad(bad: dict[str, str]) -> str:
    """Every unreadable image with its reason, on one line. `bad` maps a path to the reason."""
    return "; ".join(f"{path} ({reason})" for path, reason in sorted(bad.items()))


def reject_bad(manifest: pd.DataFrame, bad: dict[str, str], on_bad_image: str) -> pd.DataFrame:
    """The manifest without the unreadable images. `bad` maps a path to the reason.

    Raises `UserError` naming all of them when `on_bad_image` is `stop` and there are any.
    """
    if bad and on_bad_image == "stop":
        raise UserError(
            f"{len(bad)} unreadable image(s): {list_bad(bad)}; fix or remove them, or use --on-bad-image skip"
        )
    return manifest[~manifest["path"].isin(bad)].reset_index(drop=True)
