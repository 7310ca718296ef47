"""The complete state of a training loop on disk, written so that a crash at any moment leaves a whole one.

A run's folder holds `last.pt` (position, history, optimizer, scheduler, scaler, generators, the trainable stages) and
the tensors it refers to: `base-P.safetensors`, the whole network at the start of phase P, and `best-E.safetensors`,
what the phase had trained at its best epoch. Every file is complete before `last.pt` names it, and those that it
no longer names are removed. A thread writes while the next epoch trains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cxr.errors import UserError
from cxr.network.weights import StateDict
from cxr.storage import write_atomically

VERSION = 1
LAST = "last.pt"
PART = 64e6  # bytes


def _damaged(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return UserError(f"{path}: this checkpoint cannot be read ({reason}); start a new run instead of resuming")


def _copied(value: Any) -> Any:
    """The same containers anew, with a copy of each tensor on the CPU: what trains on must not change what is saved."""
    copies = _to_host([tensor.detach() for tensor in _tensors(value)])
    return _with(value, iter(copies))


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in the containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inside for tensor in _tensors(each)]


def _with(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same containers anew, with these tensors in place of their own, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _with(each, tensors) for key, each in value.items()}
    return type(value)(_with(each, tensors) for each in value) if isinstance(value, list | tuple) else value


def _to_host(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU, strides kept; those of a GPU by few transfers, as it waits for the host in each."""
    packed = [tensor for tensor in tensors if tensor.is_cuda and torch.ops.aten.is_non_overlapping_and_dense(tensor)]
    copies = {id(t): copy for part in _parts(packed) for t, copy in zip(part, in_one_transfer(part), strict=True)}
    return [copies[id(tensor)] if id(tensor) in copies else tensor.to("cpu", copy=True) for tensor in tensors]


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of about `PART` bytes, as a transfer needs a copy of a group on the GPU."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        part.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def in_one_transfer(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU of tensors on one device, strides kept. Their elements must fill one block of memory each."""
    if not tensors:
        return []
    raw = torch.cat([tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8) for tensor in tensors])
    host = torch.empty_like(raw, device="cpu", pin_memory=raw.is_cuda).copy_(raw)
    parts = torch.split(host, [tensor.numel() * tensor.element_size() for tensor in tensors])
    return [
        part.clone().view(tensor.dtype).as_strided(tensor.size(), tensor.stride())
        for part, tensor in zip(parts, tensors, strict=True)
    ]


class Checkpoints:
    """The checkpoint folder of one run; with `writes=False` it only reads what another process wrote.

    What is saved is copied at once and written, in order, by a thread; `flush` waits for it, and so does the end of
    the `with` block. `flush` raises the error of a failed write (e.g. a full disk); until then nothing more is written.
    """

    def __init__(self, folder: Path, writes: bool = True):
        self.folder, self.writes = folder, writes
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._waiting: deque[Future[None]] = deque()
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._writer.shutdown()
        if kind is None:  # otherwise that error counts; a failed write only means an older checkpoint
            self.flush()

    def flush(self) -> None:
        """Wait until everything is on the disk. Raises `UserError` if it could not be written."""
        while self._waiting:
            self._waiting[0].result()
            self._waiting.popleft()
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write_later(self, write: Callable[[], object]) -> None:
        self._waiting.append(self._writer.submit(self._write, write))

    def _write(self, write: Callable[[], object]) -> None:
        if self._error:  # a state must not name a file that is not there
            return
        try:
            write()
        except Exception as error:
            self._error = error

    def save_tensors(self, name: str, state: StateDict) -> str:
        """Write tensors as `name`.safetensors and return that file's name."""
        file = f"{name}.safetensors"
        if self.writes:
            tensors = {key: value.contiguous() for key, value in _copied(state).items()}
            self._write_later(lambda: write_atomically(self.folder / file, lambda stream: stream.write(save(tensors))))
        return file

    def load_tensors(self, files: list[str]) -> StateDict:
        """The tensors of the files, a later file's over an earlier one's. Raises `UserError` for a damaged one."""
        self.flush()
        merged: StateDict = {}
        for path in [self.folder / file for file in files]:
            try:
                merged |= load_file(path)
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
        return merged

    def save(self, state: dict[str, Any], keep: set[str]) -> None:
        """Write the loop's state, then remove what it does not name: tensor files not in `keep`, half-written ones.

        A run's first state is waited for, so that a run that has logged an epoch can be resumed.
        """
        if not self.writes:
            return
        whole = {"version": VERSION, **_copied(state)}
        self._write_later(lambda: self._write_state(whole, keep))
        if not (self.folder / LAST).exists():
            self.flush()

    def _write_state(self, state: dict[str, Any], keep: set[str]) -> None:
        write_atomically(self.folder / LAST, lambda stream: torch.save(state, stream))
        for file in [*self.folder.glob("*.safetensors"), *self.folder.glob(".*.tmp")]:
            if file.name not in keep:
                with suppress(OSError):  # one left over does no harm
                    file.unlink()

    def load(self) -> dict[str, Any] | None:
        """The last state saved, or None. Raises `UserError` when it is damaged or of another version of `cxr`."""
        self.flush()
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
