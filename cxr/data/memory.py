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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cxr.data import dicom
from cxr.storage import Cache

UNREADABLE = "unreadable:"  # prefix of the digest of a file that cannot be read
FRESH = 2_000_000_000  # ns; a file changed so recently may change again without a new time
_PNG = b"\x89PNG\r\n\x1a\n"
_BATCH = 500  # rows asked for at once; SQLite allows 999 values
_Row = tuple[bytes, str, str, bytes]  # the key of the path, its state, what was found, a checksum of the three
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
    """What was found in files, by path and state. Without a `file`, it lasts as long as this object."""

    def __init__(self, file: Path | None = None):
        self.file = file
        self._known: dict[tuple[Path, str], str] = {}
        self._facts: dict[Path, Facts] = {}

    @classmethod
    def of(cls, cache: Cache) -> Memory:
        """That of a cache folder and this machine: others see other times, and SQLite is not for shared folders."""
        return cls(cache.root / f"files-{socket.gethostname()}.sqlite")

    def facts(self, paths: Iterable[Path]) -> list[Facts]:
        """Of each file, in order; those that are not known are read. This object looks at each file once."""
        files = list(paths)
        self._look_at(list(dict.fromkeys(file for file in files if file not in self._facts)))
        return [self._facts[file] for file in files]

    def _look_at(self, files: Sequence[Path]) -> None:
        looked = time.time_ns()
        states = dict(zip(files, _states(files), strict=True))
        self._recall([(file, state) for file, state in states.items() if state])
        known = {file: self._known[file, state] for file, state in states.items() if (file, state) in self._known}
        new = [file for file in files if file not in known]
        with ThreadPoolExecutor() as pool:
            read = tqdm(pool.map(Facts.of, new), "reading files", len(new), unit="file", leave=False, disable=None)
            found = dict(zip(new, read, strict=True))
        readable = [file for file, each in found.items() if not each.digest.startswith(UNREADABLE)]
        self._note([(file, states[file], found[file].text()) for file in readable if states[file]], looked)
        self._facts |= {file: Facts.parse(text) for file, text in known.items()} | found

    def confirms(self, file: Path, token: str) -> bool:
        """Whether `token` was noted of the file as it is now."""
        state = state_of(file)
        self._recall([(file, state)])
        return bool(state) and self._known.get((file, state)) == token

    def note(self, file: Path, token: str, state: str) -> None:
        """Note what was found out about the file while it had this state (`state_of`)."""
        if state and state == state_of(file):
            self._note([(file, state, token)], time.time_ns())

    def _recall(self, asked: Sequence[tuple[Path, str]]) -> None:
        wanted = {_key(file): (file, state) for file, state in asked if (file, state) not in self._known}
        for path, state, text, checksum in self._rows(list(wanted)):
            if wanted[path][1] == state and checksum == _checksum(path, state, text):
                self._known[wanted[path]] = text

    def _rows(self, keys: Sequence[bytes]) -> list[_Row]:
        if not self.file or not keys or not self.file.exists():
            return []

        def ask(base: sqlite3.Connection) -> list[_Row]:
            base.execute(_TABLE)
            parts = [keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH)]
            questions = [f"SELECT * FROM files WHERE path IN ({','.join('?' * len(part))})" for part in parts]
            return [row for text, part in zip(questions, parts, strict=True) for row in base.execute(text, part)]

        return self._using(ask)

    def _note(self, found: Sequence[tuple[Path, str, str]], looked: int) -> None:
        """`looked` is the time before their states were asked for, ns."""
        self._known |= {(file, state): text for file, state, text in found}
        old = looked - FRESH
        rows = [(_key(file), state, text) for file, state, text in found if max(map(int, state.split()[1:])) < old]
        if not self.file or not rows:
            return
        rows_with_checksums = [(*row, _checksum(*row)) for row in rows]

        def write(base: sqlite3.Connection) -> list[_Row]:
            with base:
                base.execute(_TABLE)
                base.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows_with_checksums)
            return []

        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._using(write)

    def _using(self, act: Callable[[sqlite3.Connection], list[_Row]]) -> list[_Row]:
        """What `act` returns; nothing, with a warning, where the file cannot be used. A damaged one is removed."""
        assert self.file
        try:
            with closing(sqlite3.connect(self.file, timeout=60)) as base:
                return act(base)
        except sqlite3.OperationalError as error:  # locked for long, full, or not to be written
            warnings.warn(f"{self.file}: cannot be used ({error}); files are read again", stacklevel=2)
        except sqlite3.DatabaseError as error:
            warnings.warn(f"{self.file}: damaged ({error}); it is made anew, and files are read again", stacklevel=2)
            with suppress(OSError):  # not removed: another process may have it open
                self.file.rename(self.file.with_name(f"{self.file.name}.damaged-{time.time_ns()}"))
        return []


def files_in(root: Path, paths: Iterable[str]) -> list[Path]:
    """`root / path` of each, in half the time."""
    return [Path(os.path.join(root, path)) for path in paths]


def _states(files: Sequence[Path]) -> list[str]:
    """The state of each; in threads, as a network may lie between."""
    parts = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    with ThreadPoolExecutor() as pool:
        return [state for part in pool.map(lambda part: [state_of(file) for file in part], parts) for state in part]


def state_of(file: Path) -> str:
    """Size and times of the last change; nothing for a file that is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _key(file: Path) -> bytes:
    return hashlib.sha256(os.fsencode(file.absolute())).digest()[:16]


def _checksum(path: bytes, state: str, text: str) -> bytes:
    return hashlib.sha256(path + f"\0{state}\0{text}".encode()).digest()[:8]
