"""The cache folder: its layout, atomic writes, locks, what it holds and what may be pruned."""

from __future__ import annotations

import getpass
import glob
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from filelock import FileLock, Timeout

from cxr.errors import InUseError, MachineError, UserError

_LOCK = ".lock"
_KEY_BYTES = 32
# Kind of content -> where its folders are.
_KINDS = {
    "activations": "activations/*",
    "decoded images": "store/*/*",
    "checkpoints": "runs/*",
    "undelivered": "outbox/*",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder in the cache: its kind, path, bytes on disk, and when it was last used (seconds since 1970)."""

    kind: str
    path: Path
    size: int
    used: float

    @property
    def days(self) -> float:
        """Days since it was last used."""
        return (time.time() - self.used) / 86400

    def line(self) -> str:
        """`12.3 MB  1.5 days ago  activations  PATH`."""
        return f"{self.size / 1e6:9.1f} MB  {self.days:6.1f} days ago  {self.kind:14}  {self.path}"


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache folder. Its layout is an interface: what earlier versions wrote is found and used."""

    root: Path

    @classmethod
    def open(cls, cache_dir: str = "auto") -> Self:
        """Make the folder if it is missing.

        `auto` is `$CXR_CACHE`, else `$XDG_CACHE_HOME/cxr`, else `~/.cache/cxr`. Raises `UserError` when it cannot be
        made.
        """
        if cache_dir == "auto":
            base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
            cache_dir = os.environ.get("CXR_CACHE") or f"{base}/cxr"
        try:
            path = Path(cache_dir).expanduser().absolute()
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: `~` without a known home folder
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--cache-dir {cache_dir}: cannot be made ({reason}); name another folder") from error
        return cls(path)

    @property
    def activations(self) -> Path:
        """The folder with the outputs of frozen prefixes."""
        return self.root / "activations"

    def checkpoints(self, run_id: str) -> Path:
        """The folder with a run's checkpoints."""
        return self.root / "runs" / run_id

    def outbox(self, run_id: str) -> Path:
        """The folder with what a run has logged and not yet delivered to the tracking store."""
        return self.root / "outbox" / run_id

    def decoded(self, size: int, resize: str) -> Path:
        """The folder with the stores of images decoded to one size."""
        return self.root / "store" / f"{size}-{resize}"

    def phantoms(self, version: object) -> Path:
        """The folder with the phantoms of one version of their generator."""
        return self.root / f"synthetic-{version}"

    def audit(self, key: str) -> Path:
        """The file with an audit's findings."""
        return self.root / "audits" / f"{key}.json"

    def depth(self, key: str) -> Path:
        """The file with the depth of a data set's 16-bit images."""
        return self.root / "depths" / f"{key}.json"

    def patient_key(self) -> bytes:
        """The random key of 32 bytes, made once for this cache, under which patients are hashed; only its owner may
        read it. Raises `UserError` when it cannot be read or made, or is damaged."""
        path = self.root / "patients.key"
        try:
            if not path.exists():
                _make_key(path)
            key = path.read_bytes()
        except OSError as error:
            raise MachineError(f"{path}: cannot be used ({error.strerror}); name another --cache-dir") from error
        if len(key) != _KEY_BYTES:
            raise MachineError(f"{path}: is damaged; restore it, or remove it and start new runs")
        return key

    def contents(self, kinds: Iterable[str] = tuple(_KINDS)) -> list[Entry]:
        """What the cache holds of these kinds, the least recently used first."""
        found = [
            Entry(kind, path, _size(path), _last_used(path))
            for kind in kinds
            for path in self.root.glob(_KINDS[kind])
            if path.is_dir()
        ]
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, days: float) -> list[Entry]:
        """Remove what was not used for so many days, and return it; checkpoints of a live run stay.

        An interrupted run cannot be resumed once its checkpoints are pruned.
        """
        removed = [entry for entry in self.contents() if entry.days >= days and not _in_use(entry)]
        for entry in removed:
            shutil.rmtree(entry.path, ignore_errors=True)
        return removed

    def make_room(self, need: float, budget: float, keep: set[Path]) -> None:
        """Remove the least recently used activations, but not `keep`, until `need` bytes more fit into `budget`.

        A file that another run has mapped stays readable to it.
        """
        entries = [entry for entry in self.contents(["activations"]) if entry.path not in keep]
        total = sum(entry.size for entry in entries) + need
        for entry in entries:
            if total <= budget:
                return
            shutil.rmtree(entry.path, ignore_errors=True)
            total -= entry.size


def _make_key(path: Path) -> None:
    """A key in a file that only the owner may read; one that another process made meanwhile stays."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)  # with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, wait: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk (unless `wait` is false) and rename it.

    Those that killed processes of this machine left for the same `path` are removed. Raises `UserError` when it cannot
    be written (disk full, say); `path` is then as it was.
    """
    start = f".{path.name}.{socket.gethostname()}"
    work = path.with_name(f"{start}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_half_written(path.parent, start)
        with work.open("wb") as file:
            write(file)
            file.flush()
            if wait:
                os.fsync(file.fileno())
        work.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise MachineError(
            f"{path}: cannot be written ({reason}); free space there or name another --cache-dir"
        ) from error
    finally:
        with suppress(OSError):  # whatever ended it, Ctrl-C too; after the rename it is gone
            work.unlink()


def _remove_half_written(folder: Path, start: str) -> None:
    for work in folder.glob(f"{glob.escape(start)}.*.tmp"):
        pid = work.name.removeprefix(f"{start}.").removesuffix(".tmp")
        if pid.isdigit() and not _alive(int(pid)):
            work.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which it becomes at the end of the block.

    If another process made `folder` meanwhile, that one stays. Half-made folders of dead processes of this machine are
    removed. Raises `OSError` when it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    work = _work_folder(folder.parent)
    try:
        yield work
        work.chmod(0o755)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)  # whatever ended it, Ctrl-C too; after the rename it is gone


def remove_folder(folder: Path) -> None:
    """Remove a folder that other processes may be looking for, or removing, too.

    Renamed first, so that nobody finds half of it. What killed processes of this machine left of theirs is removed.
    """
    remove_abandoned(folder.parent)
    work = _work_folder(folder.parent)
    with suppress(FileNotFoundError):
        folder.rename(work / "removed")
    shutil.rmtree(work)


@contextmanager
def own_temporary_files() -> Iterator[None]:
    """Temporary files of this process, those of libraries too, are in a folder of its own, removed at the end.

    Those of killed processes of this machine are removed. Raises `UserError` when it cannot be made.
    """
    before, parent = tempfile.tempdir, Path(tempfile.gettempdir())
    # Compiled kernels are kept there for later processes.
    user = getpass.getuser() if "USER" in os.environ else str(os.getuid())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(parent / f"torchinductor_{user}"))
    remove_abandoned(parent, "cxr")
    try:
        work = _work_folder(parent, "cxr")
    except OSError as error:
        raise MachineError(f"{parent}: {error.strerror}; free space there, or have TMPDIR name another") from error
    tempfile.tempdir = str(work)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if any(work.glob("pymp-*")):  # of multiprocessing, which removes it last of all, and complains if it is gone
            from multiprocessing.util import Finalize

            Finalize(None, shutil.rmtree, (work, True), exitpriority=-200)
        else:
            shutil.rmtree(work, ignore_errors=True)


def _owned(kind: str) -> str:
    return f"{kind}-{socket.gethostname()}"


def _work_folder(parent: Path, kind: str = ".building") -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{_owned(kind)}-{os.getpid()}-", dir=parent))


def remove_abandoned(parent: Path, kind: str = ".building") -> None:
    """Remove the temporary folders of this kind whose processes were of this machine and have ended."""
    for work in parent.glob(f"{_owned(kind)}-*"):
        start, _, pid = work.name.rpartition("-")[0].rpartition("-")
        # Not a host whose name merely starts like this one's.
        if start == _owned(kind) and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(work, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def holds_nothing(folder: Path) -> bool:
    """Whether there is nothing in a run's folder but its lock."""
    return all(path.name == _LOCK for path in folder.iterdir())


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the lock is released when the process ends, however it ends.

    Raises `UserError` when another process of this machine trains the same run, or nothing can be locked there.
    """
    lock = _locked(folder / _LOCK)
    try:
        yield
    finally:
        with suppress(OSError):  # a run that failed before its first checkpoint leaves nothing
            (folder / _LOCK).unlink(missing_ok=True)
            folder.rmdir()
        lock.release()


def _locked(path: Path) -> FileLock:
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)  # makes the folder again if another process removes it in between
    except Timeout as error:
        name = path.parent.name
        raise InUseError(f"--resume {name}: another process is running it; wait for it or stop it") from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MachineError(f"{path}: cannot be locked ({reason}); name another --cache-dir") from error
    return lock


def _in_use(entry: Entry) -> bool:
    if entry.kind != "checkpoints" or not (entry.path / _LOCK).exists():
        return False
    try:
        with exclusive(entry.path):
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
