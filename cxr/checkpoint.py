"""The complete state of a training loop on disk, written so that a crash at any moment leaves a whole one.

A run's folder holds `last.pt` (position, history, optimizer, scheduler, scaler, generators, the trainable stages) and
the tensors it refers to: `base-P.safetensors`, the whole network at the start of phase P, and `best-E.safetensors`,
what the phase had trained at its best epoch. Every file is complete before `last.pt` names it, and those that it
no longer names are removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cxr.errors import UserError
from cxr.model import StateDict

VERSION = 1
LAST = "last.pt"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it.

    Raises `UserError` when that fails (disk full, say); `path` is then as it was.
    """
    work = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(work)
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        work.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({reason}); free space there or name another --cache-dir"
        ) from error


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save_tensors(self, name: str, state: StateDict) -> str:
        """Write tensors as `name`.safetensors and return that file's name."""
        file = f"{name}.safetensors"
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        write_atomically(self.folder / file, lambda path: save_file(tensors, path))
        return file

    def load_tensors(self, files: list[str]) -> StateDict:
        """The tensors of the files, a later file's over an earlier one's."""
        merged: StateDict = {}
        for file in files:
            merged |= load_file(self.folder / file)
        return merged

    def save(self, state: dict[str, Any], keep: set[str]) -> None:
        """Write the loop's state, then remove the tensor files that are not in `keep`."""
        write_atomically(self.folder / LAST, lambda path: torch.save({"version": VERSION, **state}, path))
        for file in self.folder.glob("*.safetensors"):
            if file.name not in keep:
                file.unlink()

    def load(self) -> dict[str, Any] | None:
        """The last state saved, or None. Raises `UserError` when it is of another version of `cxr`."""
        path = self.folder / LAST
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["version"] != VERSION:
            raise UserError(f"{path}: written by another version of cxr (format {state['version']}, not {VERSION})")
        return state
