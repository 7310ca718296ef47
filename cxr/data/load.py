"""What a run starts from: images indexed, decoded and split, and the machine to compute on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from cxr.config import SYNTHETIC, TrainConfig
from cxr.data.depth import FULL
from cxr.data.headers import Headers, read_headers
from cxr.data.memory import Memory
from cxr.data.phantoms import VERSION, write_synthetic
from cxr.data.sources import Source, read_source, require_splits
from cxr.data.splits import assign_fold, assign_splits, fingerprint
from cxr.data.store import Store, open_store
from cxr.errors import UserError
from cxr.storage import Cache
from cxr.task import KAGGLE, Task
from cxr.threshold_rule import RuleKind

# How an owner finds a file whose path is not shown.
HIDDEN_HINT = " (paths are hidden: `sha256sum` of the files finds them, --paths plain shows them)"


@dataclass(frozen=True, slots=True)
class Data:
    """A data set ready to train on: the manifest (bad images left out), the decoded images, and their origin.

    `files` maps the manifest's `path` to the file; the former may be a digest in place of the path. `depth` is that of
    16-bit grey, in bits.
    """

    manifest: pd.DataFrame
    store: Store
    bad: dict[str, str]
    root: Path
    fingerprint: str
    synthetic: bool
    task: Task = KAGGLE
    remarks: tuple[str, ...] = ()  # about the source, for people
    held_out: str = "test"  # the split that reports: `fold` in a cross-validation
    files: Mapping[str, str] = field(default_factory=dict)
    depth: int = FULL

    def part(self, split: str) -> pd.DataFrame:
        """The manifest's rows of one split."""
        return self.manifest[self.manifest["split"] == split]

    def without(self, split: str) -> Data:
        """The same data, with no row of that split in the manifest: nothing can be made of it."""
        return replace(self, manifest=self.manifest[self.manifest["split"] != split].reset_index(drop=True))


def read_data(config: TrainConfig) -> Data:
    """Index, decode and split. Raises `UserError` for a folder or files that cannot be used."""
    cache = Cache.open(config.cache_dir)
    memory = Memory.of(cache)
    synthetic, source = config.data_dir == SYNTHETIC, source_of(config, memory)
    require_possible(config, source.task)
    found = read_headers(source.root, source.table, cache, config.paths, config.depth, memory)
    table, reading = found.table, found.reading
    store = open_store(
        list(found.files.values()), table["digest"].tolist(), config.image_size, config.resize, cache, reading
    )
    bad = bad_paths(table, store)
    table = reject_bad(table, bad, config.on_bad_image, reading.hidden)
    require_splits(table, config.splits)
    manifest = _split(config, table, found, source.task)
    shapes = [store.shapes[digest] for digest in manifest["digest"].tolist()]
    manifest[["width", "height", "mode"]] = pd.DataFrame(shapes, index=manifest.index)
    identity, held_out = fingerprint(manifest, reading.depth), "fold" if config.fold_numbers() else "test"
    origin = (source.root, identity, synthetic, source.task, source.remarks)
    return Data(manifest, store, bad, *origin, held_out, found.files, reading.depth)


def _split(config: TrainConfig, table: pd.DataFrame, found: Headers, task: Task) -> pd.DataFrame:
    """The manifest with the column `split`, and the groups to log."""
    if fold := config.fold_numbers():
        manifest = assign_fold(table, fold, config.val_fraction, config.split_seed, task)
    else:
        manifest = assign_splits(table, config.kept_split, config.val_fraction, config.split_seed, task)
    return manifest.assign(group=manifest["path"].map(found.groups))


def require_possible(config: TrainConfig, task: Task) -> None:
    """Raise `UserError` for what only two classes can have, before anything is trained."""
    count = len(task.classes)
    if not task.binary and config.threshold_rule.kind is not RuleKind.YOUDEN:
        raise UserError(f"--threshold {config.threshold}: is for two classes, not {count}; leave it out")
    if not task.binary and config.calibration == "platt":
        raise UserError(f"--calibration platt: is for two classes, not {count}; use temperature or none")


def source_of(config: TrainConfig, memory: Memory | None = None) -> Source:
    """The images of `data_dir`; phantoms are made if they are missing."""
    if config.data_dir != SYNTHETIC:
        return read_source(config, config.data_dir, memory)
    return read_source(config, write_synthetic(Cache.open(config.cache_dir).phantoms(VERSION)), memory)


def bad_paths(table: pd.DataFrame, store: Store) -> dict[str, str]:
    """Path -> reason, of the images that the store could not decode."""
    rows = zip(table["path"].tolist(), table["digest"].tolist(), strict=True)
    return {path: store.bad[digest] for path, digest in rows if digest in store.bad}


def list_bad(bad: dict[str, str]) -> str:
    """Every unreadable image with its reason, on one line. `bad` maps a path to the reason."""
    return "; ".join(f"{path} ({reason})" for path, reason in sorted(bad.items()))


def reject_bad(manifest: pd.DataFrame, bad: dict[str, str], on_bad_image: str, hidden: bool = False) -> pd.DataFrame:
    """The manifest without the unreadable images. `bad` maps a path to the reason, or what stands for it if `hidden`.

    Raises `UserError` naming all of them when `on_bad_image` is `stop` and there are any.
    """
    if bad and on_bad_image == "stop":
        raise UserError(
            f"{len(bad)} unreadable image(s): {list_bad(bad)}; fix or remove them, or use --on-bad-image skip"
            + HIDDEN_HINT * hidden
        )
    return manifest[~manifest["path"].isin(bad)].reset_index(drop=True)
