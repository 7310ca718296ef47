"""The cache folder: where it is, atomic writes, locks, what it holds and what may be pruned."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from cxr.config import TrainConfig
from cxr.errors import InUseError, MachineError, UserError


def checkpoint_folder(config: TrainConfig, run_id: str) -> Path:
    """Where the run's checkpoints are."""
    return cache_folder(config.cache_dir) / "runs" / run_id


def cache_folder(cache_dir: str = "auto") -> Path:
    """The folder for decoded images, phantoms and checkpoints, made if absent.

    `auto` is `$CXR_CACHE`, else `$XDG_CACHE_HOME/cxr`, else `~/.cache/cxr`. Raises `UserError` when it
    cannot be made.
    """
    if cache_dir == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache_dir = os.environ.get("CXR_CACHE") or f"{base}/cxr"
    try:
        path = Path(cache_dir).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~` where no home folder is known
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--cache-dir {cache_dir}: cannot be made ({reason}); name another folder") from error
    return path


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


@dataclass(frozen=True, slots=True)
class Kept:
    """Something in the cache folder: its kind, path, bytes on disk, and when it was last used (seconds since 1970)."""

    kind: str
    path: Path
    size: int
    used: float

    @property
    def days(self) -> float:
        """Days since it was last used."""
        return (time.time() - self.used) / 86400

    def line(self) -> str:
        """For people."""
        return f"{self.size / 1e6:9.1f} MB  {self.days:6.1f} days ago  {self.kind:14}  {self.path}"


_KINDS = {"activations": "activations/*", "decoded images": "store/*/*", "checkpoints": "runs/*"}


def contents(cache: Path, kinds: Iterable[str] = tuple(_KINDS)) -> list[Kept]:
    """What the cache folder holds of these kinds, the least recently used first."""
    found = [
        Kept(kind, path, _size(path), _last_used(path))
        for kind in kinds
        for path in cache.glob(_KINDS[kind])
        if path.is_dir()
    ]
    return sorted(found, key=lambda kept: kept.used)


def prune(cache: Path, days: float) -> list[Kept]:
    """Remove what was not used for so many days, and return it. Checkpoints of a run that goes on are left alone.

    Checkpoints of an interrupted run are gone with this: it can no longer be resumed.
    """
    removed = [kept for kept in contents(cache) if kept.days >= days and not _in_use(kept)]
    for kept in removed:
        shutil.rmtree(kept.path, ignore_errors=True)
    return removed


def _in_use(kept: Kept) -> bool:
    if kept.kind != "checkpoints" or not (kept.path / ".lock").exists():
        return False
    try:
        with exclusive(kept.path):
            return False
    except UserError:
        return True


def _size(folder: Path) -> int:
    return sum(stat.st_blocks * 512 for stat in _stats(folder))


def _last_used(folder: Path) -> float:
    return max((stat.st_mtime for stat in _stats(folder)), default=0.0)


def _stats(folder: Path) -> list[os.stat_result]:
    """Of the folder and all in it, less what another process removes meanwhile."""
    found = []
    with suppress(FileNotFoundError):
        for path in [folder, *folder.rglob("*")]:
            with suppress(FileNotFoundError):
                found.append(path.stat())
    return found


def make_room(folder: Path, need: float, budget: float, keep: set[Path]) -> None:
    """Remove the least recently used files of a shelf until `need` bytes more fit into `budget`.

    A file that another run has mapped stays readable to it.
    """
    files = [kept for kept in contents(folder.parent, ["activations"]) if kept.path.parent == folder]
    files = [kept for kept in files if kept.path not in keep]
    total = sum(kept.size for kept in files) + need
    for kept in files:
        if total <= budget:
            return
        shutil.rmtree(kept.path, ignore_errors=True)
        total -= kept.size
