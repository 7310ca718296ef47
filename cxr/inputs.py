"""What a run starts from: images indexed, decoded and split, and the machine to compute on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from cxr.config import SYNTHETIC, TrainConfig
from cxr.data.audit import reject_bad
from cxr.data.index import assign_fold, assign_splits, find_root, fingerprint, index_folder
from cxr.data.store import Store, open_store
from cxr.data.synthetic import VERSION, write_synthetic
from cxr.errors import UserError
from cxr.runtime import cache_folder, hold_memory, processes, resolve_device, resolve_precision, seed_everything


@dataclass(frozen=True, slots=True)
class Data:
    """A data set ready to train on: the manifest (bad images left out), the decoded images, and their origin."""

    manifest: pd.DataFrame
    store: Store
    bad: dict[str, str]
    root: Path
    fingerprint: str
    synthetic: bool
    held_out: str = "test"  # the split that reports: `fold` in a cross-validation

    def part(self, split: str) -> pd.DataFrame:
        """The manifest's rows of one split."""
        return self.manifest[self.manifest["split"] == split]

    def without(self, split: str) -> Data:
        """The same data, with no row of that split in the manifest: nothing can be made of it."""
        return replace(self, manifest=self.manifest[self.manifest["split"] != split].reset_index(drop=True))


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and how to compute."""

    device: torch.device
    precision: str


def read_data(config: TrainConfig) -> Data:
    """Index, decode and split. Raises `UserError` for a folder or files that cannot be used."""
    cache = cache_folder(config.cache_dir)
    synthetic = config.data_dir == SYNTHETIC
    root = find_root(write_synthetic(cache / f"synthetic-{VERSION}") if synthetic else config.data_dir)
    table = index_folder(root)
    files = [root / path for path in table["path"]]
    store = open_store(files, list(table["digest"]), config.image_size, config.resize, cache)
    bad = bad_paths(table, store)
    table = reject_bad(table, bad, config.on_bad_image)
    fold = config.fold_numbers()
    if fold:
        manifest = assign_fold(table, *fold, config.val_fraction, config.split_seed)
    else:
        manifest = assign_splits(table, config.val_split, config.val_fraction, config.split_seed)
    shapes = [store.shapes[digest] for digest in manifest["digest"]]
    manifest[["width", "height", "mode"]] = pd.DataFrame(shapes, index=manifest.index)
    return Data(manifest, store, bad, root, fingerprint(manifest), synthetic, "fold" if fold else "test")


def bad_paths(table: pd.DataFrame, store: Store) -> dict[str, str]:
    """Path -> reason, of the images that the store could not decode."""
    return {p: store.bad[d] for p, d in zip(table["path"], table["digest"], strict=True) if d in store.bad}


def ready_machine(config: TrainConfig) -> Machine:
    """Device and precision by `config`, all generators seeded."""
    device = resolve_device(config.device)
    if config.compile == "graphs" and device.type != "cuda":
        raise UserError("--compile graphs: records what a GPU is told to do; without one, use inductor or none")
    if config.compile != "none" and processes() > 1:
        raise UserError(f"--compile {config.compile}: for one process alone; leave it out under torchrun")
    if device.type == "cpu":
        hold_memory()
    machine = Machine(device, resolve_precision(config.precision, device))
    seed_everything(config.seed, device)
    return machine


def checkpoint_folder(config: TrainConfig, run_id: str) -> Path:
    """Where the run's checkpoints are."""
    return cache_folder(config.cache_dir) / "runs" / run_id
