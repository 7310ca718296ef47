"""The complete state of a training loop on disk, written so that a crash at any moment leaves a whole one.

A run's folder holds `last.pt` (position, history, optimizer, scheduler, scaler, generators, the trainable stages) and
the tensors it refers to: `base-P.safetensors`, the whole network at the start of phase P, and `best-E.safetensors`,
what the phase had trained at its best epoch. Every file is complete before `last.pt` names it, and those that it
no longer names are removed. A thread writes while the next epoch trains.

The formats have no checksum that is checked when they are read, so `last.pt` holds those of the tensor files, and its
own as the comment of the ZIP file that it is. Checkpoints of earlier versions have none and are read as they are.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, Self, cast

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
_MARK = b"\x0e\0crc32 "  # length of the comment of a ZIP file, and the comment, less the 8 hex digits that follow
_CHUNK = 1 << 20


def _damaged(path: Path, error: Exception | str) -> UserError:
    reason = error if isinstance(error, str) else getattr(error, "strerror", None) or type(error).__name__
    return UserError(f"{path}: this checkpoint cannot be read ({reason}); start a new run instead of resuming")


class _Summed:
    """A file that is written, with the CRC-32 of what has been."""

    def __init__(self, file: BinaryIO):
        self.file, self.crc = file, 0

    def write(self, data: bytes) -> int:
        """As the file's own."""
        self.crc = zlib.crc32(data, self.crc)
        return self.file.write(data)

    def flush(self) -> None:
        """As the file's own."""
        self.file.flush()


def _save_marked(state: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save`, and the checksum as the ZIP file's comment, in place of the empty one that it ends with."""
    summed = _Summed(file)
    torch.save(state, cast(IO[bytes], summed))
    file.seek(-2, os.SEEK_END)
    file.write(_MARK + b"%08x" % summed.crc)


def _require_marked(path: Path) -> None:
    """Raise `UserError` for a file of `_save_marked` that is not as it was written."""
    with path.open("rb") as file:
        size = max(0, file.seek(0, os.SEEK_END) - len(_MARK) - 8)
        file.seek(size)
        mark, crc = file.read(len(_MARK)), file.read(8)
    if mark == _MARK and b"%08x" % zlib.crc32(b"\0\0", _crc(path, size)) != crc:
        raise _damaged(path, "its checksum differs")


def _crc(path: Path, size: int) -> int:
    """The CRC-32 of the first `size` bytes of a file."""
    crc = 0
    with path.open("rb") as file:
        for start in range(0, size, _CHUNK):
            crc = zlib.crc32(file.read(min(_CHUNK, size - start)), crc)
    return crc


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
        self._checks: dict[str, int] = {}  # tensor file -> CRC-32

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
            self._write_later(lambda: self._write_tensors(file, save(tensors)))
        return file

    def _write_tensors(self, file: str, data: bytes) -> None:
        self._checks[file] = zlib.crc32(data)
        write_atomically(self.folder / file, lambda stream: stream.write(data))

    def load_tensors(self, files: list[str]) -> StateDict:
        """The tensors of the files, a later file's over an earlier one's. Raises `UserError` for a damaged one."""
        self.flush()
        merged: StateDict = {}
        for path in [self.folder / file for file in files]:
            try:
                if self._checks.get(path.name) not in (None, _crc(path, path.stat().st_size)):
                    raise _damaged(path, "its checksum differs")
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
        self._checks = {file: crc for file, crc in self._checks.items() if file in keep}
        whole = {**state, "checks": self._checks}
        write_atomically(self.folder / LAST, lambda stream: _save_marked(whole, stream))
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
            _require_marked(path)
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except UserError:
            raise
        except Exception as error:  # torch raises many kinds for a damaged file that has no checksum
            raise _damaged(path, error) from error
        if state["version"] != VERSION:
            raise UserError(f"{path}: written by another version of cxr (format {state['version']}, not {VERSION})")
        self._checks = state.pop("checks", {})
        return state
