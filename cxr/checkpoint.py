"""The complete state of a training loop on disk, written so that a crash at any moment leaves a whole one.

A run's folder holds `last.pt` (position, history, optimizer, scheduler, scaler, generators, the trainable stages) and
the tensors it refers to: `base-P.safetensors`, the whole network at the start of phase P, and `best-E.safetensors`,
what the phase had trained at its best epoch. Every file is complete before `last.pt` names it, and those that it
no longer names are removed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cxr.errors import InUseError, MachineError, UserError
from cxr.model import StateDict

VERSION = 1
LAST = "last.pt"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it.

    Raises `UserError` when that fails (disk full, say); `path` is then as it was.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with work.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError
        with suppress(OSError):
            work.unlink()
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise MachineError(
            f"{path}: cannot be written ({reason}); free space there or name another --cache-dir"
        ) from error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the lock falls with the process, however it ends.

    Raises `UserError` when another process of this machine trains the same run, or nothing can be locked there.
    """
    lock = folder / ".lock"
    file = _lock(lock)
    try:
        yield
    finally:
        with file, suppress(OSError):  # a run that failed before its first checkpoint leaves nothing
            lock.unlink()
            folder.rmdir()


def _lock(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
    except BlockingIOError as error:
        name = path.parent.name
        raise InUseError(f"--resume {name}: another process is at work on this run; wait or stop it") from error
    except OSError as error:
        raise MachineError(f"{path}: cannot be locked ({error.strerror}); name another --cache-dir") from error
    return file


def _damaged(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return UserError(f"{path}: this checkpoint cannot be read ({reason}); start a new run instead of resuming")


class Checkpoints:
    """The checkpoint folder of one run. One that `writes` nothing reads what another process wrote there."""

    def __init__(self, folder: Path, writes: bool = True):
        self.folder, self.writes = folder, writes

    def save_tensors(self, name: str, state: StateDict) -> str:
        """Write tensors as `name`.safetensors and return that file's name."""
        file = f"{name}.safetensors"
        if not self.writes:
            return file
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        write_atomically(self.folder / file, lambda stream: stream.write(save(tensors)))
        return file

    def load_tensors(self, files: list[str]) -> StateDict:
        """The tensors of the files, a later file's over an earlier one's. Raises `UserError` for a damaged one."""
        merged: StateDict = {}
        for path in [self.folder / file for file in files]:
            try:
                merged |= load_file(path)
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
        return merged

    def save(self, state: dict[str, Any], keep: set[str]) -> None:
        """Write the loop's state, then remove what it does not name: tensor files not in `keep`, half-written ones."""
        if not self.writes:
            return
        write_atomically(self.folder / LAST, lambda stream: torch.save({"version": VERSION, **state}, stream))
        for file in [*self.folder.glob("*.safetensors"), *self.folder.glob(".*.tmp")]:
            if file.name not in keep:
                file.unlink()

    def load(self) -> dict[str, Any] | None:
        """The last state saved, or None. Raises `UserError` when it is damaged or of another version of `cxr`."""
        path = self.folder / LAST
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise _damaged(path, error) from error
        if state["version"] != VERSION:
            raise UserError(f"{path}: written by another version of cxr (format {state['version']}, not {VERSION})")
        return state
