"""What was found in files before, so that those of a known data set are not read again when a run begins.

A file is taken to be the same while its size and the times of its last change are, of content and of status (as git
does). What was found is in an SQLite file of the cache, under the sha256 of the path, which may identify a person. A
row that was damaged is not believed, and a damaged SQLite file is made anew.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from cxr.data import dicom
from cxr.storage import Cache

UNREADABLE = "unreadable:"  # prefix of the digest of a file that cannot be read
FRESH = 2_000_000_000  # ns; a file changed so recently may change again without a new time
StrPath = str | os.PathLike[str]  # a hundred thousand Path objects take seconds to make
_PNG = b"\x89PNG\r\n\x1a\n"
_BATCH = 500  # rows asked for at once; SQLite allows 999 values
# The key of a path, the state of the file, what was found in it, a checksum of the three.
_TABLE = "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, state TEXT, found TEXT, checksum BLOB)"


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a file: the sha256 of its bytes (or `unreadable:` and the path), whether it is DICOM by its preamble, and
    whether it is a PNG of 16-bit grey."""

    digest: str
    dicom: bool = False
    deep: bool = False

    @classmethod
    def of(cls, file: Path) -> Facts:
        """Read the file."""
        try:
            data = file.read_bytes()
        except OSError:
            return cls(f"{UNREADABLE}{file}")
        deep = data.startswith(_PNG) and data[24:26] == bytes([16, 0])  # IHDR: bit depth and colour type
        return cls(hashlib.sha256(data).hexdigest(), dicom.is_dicom(data), deep)

    def text(self) -> str:
        """As `parse` reads it."""
        return f"{self.digest} {self.dicom:d} {self.deep:d}"

    @classmethod
    def parse(cls, text: str) -> Facts:
        """The inverse of `text`."""
        digest, radiograph, deep = text.rsplit(" ", 2)
        return cls(digest, radiograph == "1", deep == "1")


class Memory:
    """What was found in files. Without a `file` to keep it in, it lasts as long as this object."""

    def __init__(self, file: Path | None = None):
        self.file = file
        self._facts: dict[str, Facts] = {}

    @classmethod
    def of(cls, cache: Cache) -> Memory:
        """That of a cache folder and this machine: others see other times, and SQLite is not for shared folders."""
        return cls(cache.root / f"files-{socket.gethostname()}.sqlite")

    def facts(self, paths: Iterable[StrPath]) -> list[Facts]:
        """Of each file, in order; those that are not known are read. This object looks at each file once."""
        files = [os.fspath(path) for path in paths]
        self._look_at(list(dict.fromkeys(file for file in files if file not in self._facts)))
        return [self._facts[file] for file in files]

    def _look_at(self, files: Sequence[str]) -> None:
        looked = time.time_ns()
        states = dict(zip(files, _states(files), strict=True))
        known = {file: Facts.parse(text) for file, text in self._kept(states).items()}
        new = [file for file in files if file not in known]
        with ThreadPoolExecutor() as pool:
            read = tqdm(
                pool.map(Facts.of, map(Path, new)), "reading files", len(new), unit="file", leave=False, disable=None
            )
            found = dict(zip(new, read, strict=True))
        readable = [file for file, each in found.items() if not each.digest.startswith(UNREADABLE)]
        self._keep([(file, states[file], found[file].text()) for file in readable], looked)
        self._facts |= known | found

    def confirms(self, file: Path, token: str) -> bool:
        """Whether `token` was noted of the file as it is now."""
        path = os.fspath(file)
        return self._kept({path: state_of(path)}).get(path) == token

    def note(self, file: Path, token: str, state: str) -> None:
        """Note what was found out about the file while it had this state (`state_of`)."""
        if state == state_of(file):
            self._keep([(os.fspath(file), state, token)], time.time_ns())

    def _kept(self, states: Mapping[str, str]) -> dict[str, str]:
        """File -> what is kept of it, of those that are in these states, and whose row is not damaged."""
        if not self.file or not self.file.exists():
            return {}
        files, found = {_key(file): file for file, state in states.items() if state}, {}
        keys = list(files)
        with _or_without(self.file), _connected(self.file) as database:
            for part in (keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH)):
                rows = database.execute(f"SELECT * FROM files WHERE path IN ({','.join('?' * len(part))})", part)
                for path, state, text, checksum in rows:
                    if state == states[files[path]] and checksum == _checksum(path, state, text):
                        found[files[path]] = text
        return found

    def _keep(self, found: Iterable[tuple[str, str, str]], looked: int) -> None:
        """(file, state, what was found); `looked` is the time before their states were asked for, ns."""
        old = looked - FRESH
        rows = [(_key(file), state, text) for file, state, text in found if state and _changed(state) < old]
        if self.file and rows:
            with _or_without(self.file), _connected(self.file) as database, database:
                rows_with_checksums = [(*row, _checksum(*row)) for row in rows]
                database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows_with_checksums)


@contextmanager
def _or_without(file: Path) -> Iterator[None]:
    """For a block that is given up, with a warning, where the database cannot be used; a damaged one is set aside."""
    try:
        yield
    except sqlite3.OperationalError as error:  # locked for long, full, or not to be written
        warnings.warn(f"{file}: cannot be used ({error}); files are read again", stacklevel=2)
    except sqlite3.DatabaseError as error:
        warnings.warn(f"{file}: damaged ({error}); it is made anew, and files are read again", stacklevel=2)
        with suppress(OSError):  # not removed: another process may have it open
            file.rename(file.with_name(f"{file.name}.damaged-{time.time_ns()}"))


def _connected(file: Path) -> closing[sqlite3.Connection]:
    file.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(file, timeout=60)
    try:
        database.execute(_TABLE)
    except sqlite3.Error:
        database.close()
        raise
    return closing(database)


def files_in(root: Path, paths: pd.Series) -> list[str]:
    """`root / path` of each."""
    top = os.fspath(root)
    return [
        os.path.join(top, path) for path in paths.tolist()
    ]  # thirty times as fast as iterating over Arrow's strings


def _states(files: Sequence[str]) -> list[str]:
    """The state of each; in threads, as a network may lie between."""
    parts = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    with ThreadPoolExecutor() as pool:
        return [state for part in pool.map(lambda part: [state_of(file) for file in part], parts) for state in part]


def state_of(file: StrPath) -> str:
    """Size and times of the last change; nothing for a file that is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _changed(state: str) -> int:
    """The time of the last change, ns."""
    return max(map(int, state.split()[1:]))


def _key(file: str) -> bytes:
    whole = file if os.path.isabs(file) else os.path.join(os.getcwd(), file)
    return hashlib.sha256(os.fsencode(whole)).digest()[:16]


def _checksum(path: bytes, state: str, text: str) -> bytes:
    return hashlib.sha256(path + f"\0{state}\0{text}".encode()).digest()[:8]
