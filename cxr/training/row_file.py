"""The outputs of a frozen prefix for each image, in files of the cache folder that runs, trials and folds share.

A file holds one prefix's output for one view, a row for each image of the store, filled as needed. A row's
value is a function of the file's key alone, so that processes may fill the same file at the same time.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cxr.errors import MachineError

Rows = npt.NDArray[np.int64]
VERSION = 2
_VALUES, _CHECKS = "rows.bin", "checks.bin"
_FILLED = 1 << 32  # a row's check is this and the crc32 of its bytes; 0 for a row that is not there
_SAME_SIZE = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def row_file_name(*parts: object) -> str:
    """The name of a row file's folder, from all that the rows depend on."""
    return hashlib.sha256(repr((VERSION, torch.__version__, *parts)).encode()).hexdigest()[:24]


class RowFile:
    """`rows` tensors of one shape [c, h, w] on disk. Raises `UserError` when the disk is full."""

    def __init__(self, folder: Path, rows: int, shape: tuple[int, ...], dtype: torch.dtype):
        channels, height, width = shape
        self.folder, self.stored, self.dtype = folder, (rows, height, width, channels), dtype
        self.size = channels * height * width * dtype.itemsize
        self._known = np.zeros(rows, bool)  # rows whose checksum this process has verified
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, length in ((_VALUES, rows * self.size), (_CHECKS, rows * 8)):
                with (folder / name).open("ab") as file:
                    file.truncate(length)  # sparse: a row that is not written takes no space
            os.utime(folder)  # when it was last used
            # Kept open, so that this run can still read it if another run removes the folder to make room.
            self._file, self._checks = (os.open(folder / name, os.O_RDWR) for name in (_VALUES, _CHECKS))
            weakref.finalize(self, _close, self._file, self._checks)
        except OSError as error:
            raise _no_room(folder, error) from error
        values = np.memmap(folder / _VALUES, _numpy_type(dtype), "c", shape=self.stored)
        self._bytes = values.reshape(rows, -1)
        self.values = torch.from_numpy(values).view(dtype).permute(0, 3, 1, 2)

    def missing(self, wanted: Rows) -> Rows:
        """Those of the rows that are missing or damaged."""
        unseen = wanted[~self._known[wanted]]
        if not len(unseen):
            return unseen
        checks = np.frombuffer(os.pread(self._checks, 8 * len(self._known), 0), np.uint64)
        good = [checks[row] == _check(self._bytes[row].tobytes()) if checks[row] else False for row in unseen]
        self._known[unseen[np.array(good, bool)]] = True
        return wanted[~self._known[wanted]]

    def write(self, rows: Rows, values: Tensor) -> None:
        """Keep values [n, c, h, w]. Written, not mapped: on a full disk a mapped write dies of SIGBUS."""
        flat = values.detach().permute(0, 2, 3, 1).contiguous().view(_SAME_SIZE[self.dtype]).numpy()
        try:
            for row, value in zip(rows.tolist(), flat, strict=True):
                data = value.tobytes()
                os.pwrite(self._file, data, row * self.size)
                os.pwrite(self._checks, np.uint64(_check(data)).tobytes(), row * 8)
        except OSError as error:
            raise _no_room(self.folder, error) from error
        self._known[rows] = True


def _close(*files: int) -> None:
    for file in files:
        os.close(file)


def _numpy_type(dtype: torch.dtype) -> type[np.generic]:
    return np.int32 if dtype.itemsize == 4 else np.int16


def _check(data: bytes) -> int:
    return _FILLED | zlib.crc32(data)


def _no_room(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{folder}: cannot keep activations ({error.strerror}); free space there (`cxr data cache`), name another "
        "--cache-dir, or use --reuse-gb 0"
    )
