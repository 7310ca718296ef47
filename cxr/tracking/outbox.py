"""What a run logs while the store may be away: written to disk first, and delivered in order by a thread."""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Thread

from cxr.errors import MachineError
from cxr.storage import write_atomically
from cxr.tracking.delivery import Entry, deliver
from cxr.tracking.outage import OUTAGE, RETRY, is_outage, store_address

_NEXT = 0.5  # seconds after which a waiting thread looks whether it is to end


class Outbox:
    """The entries of one run that are not delivered, as numbered files in a folder of its own.

    Entries survive the process once `put` returns; what one that was killed has left is found by `deliver_left`. After
    a power failure in the same second they may be missing, as `put` does not wait for the disk: a resumed run logs
    again what its checkpoint holds and the store lacks. A file that is an entry's artifact lies in a folder beside it,
    and is written before it.
    """

    def __init__(self, run_id: str, folder: Path):
        self.run_id, self.folder = run_id, folder
        self._last = 0
        self._waiting: deque[tuple[int, Entry]] = deque()
        self._changed = Condition()
        self._ending = False
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def deliver_left(self) -> int:
        """Deliver what an earlier process has left, in this thread; returns how many entries that were.

        Raises what MLflow raises; what was not delivered stays.
        """
        left = sorted(int(path.stem) for path in self.folder.glob("*.json"))
        for number in left:
            self._deliver(number, json.loads(self._entry(number).read_text()))
        self._remove()
        return len(left)

    def start(self) -> None:
        """Deliver in a thread from now on."""
        self._thread = Thread(target=self._work, daemon=True, name="outbox")
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Keep an entry, and deliver it after those before it. Raises what ended the delivery, if anything did."""
        with self._changed:
            self._raise()
            self._last += 1
            self._write(self._last, entry)
            self._waiting.append((self._last, entry))
            self._changed.notify_all()

    @contextmanager
    def artifact(self, name: str) -> Iterator[Path]:
        """A file of that name to be written in the block; `put` its entry after that."""
        with self._changed:
            self._last += 1
            folder = self.folder / f"{self._last:06}"
        folder.mkdir(parents=True)
        yield folder / name

    def drain(self, say: Callable[[str], object]) -> None:
        """Wait until all is delivered, as long as the store answers, and up to the patience for an outage.

        Raises what ended the delivery, and `MachineError` when the patience is spent.
        """
        told, until = False, time.monotonic() + OUTAGE.patience
        with self._changed:
            while self._waiting:
                self._raise()
                if not OUTAGE.lasts:
                    until = time.monotonic() + OUTAGE.patience
                elif time.monotonic() > until:
                    raise self._given_up()
                elif not told:
                    say(f"waiting for MLflow, to deliver {len(self._waiting)} entries; they are kept in {self.folder}")
                    told = True
                self._changed.wait(_NEXT)
            self._raise()

    def close(self) -> None:
        """End the thread, once all is delivered or the store does not answer; what is not delivered stays on disk."""
        with self._changed:
            while self._waiting and self._error is None and not OUTAGE.lasts:
                self._changed.wait(_NEXT)
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_NEXT + RETRY)
        if not self._waiting:
            self._remove()

    def _work(self) -> None:
        while (following := self._next()) is not None:
            try:
                self._deliver(*following)
            except BaseException as error:
                if not is_outage(error):
                    self._end(error)
                    return
                OUTAGE.began(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._ending, RETRY)
                continue
            OUTAGE.ended()
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()

    def _next(self) -> tuple[int, Entry] | None:
        """The entry to be delivered next, with its number; None at the end."""
        with self._changed:
            while not self._waiting and not self._ending:
                self._changed.wait(_NEXT)
            return None if self._ending else self._waiting[0]

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _given_up(self) -> MachineError:
        minutes, count = OUTAGE.patience / 60, len(self._waiting)
        return MachineError(
            f"MLflow at {store_address()} has not answered for {minutes:g} minutes; {count} entries of run "
            f"{self.run_id} are kept in {self.folder}; when it answers again, continue with: "
            f"cxr train --resume {self.run_id}"
        )

    def _entry(self, number: int) -> Path:
        return self.folder / f"{number:06}.json"

    def _write(self, number: int, entry: Entry) -> None:
        text = json.dumps(entry).encode()
        write_atomically(self._entry(number), lambda file: file.write(text), wait=False)

    def _deliver(self, number: int, entry: Entry) -> None:
        deliver(self.run_id, entry, self.folder)
        self._entry(number).unlink()
        if entry["kind"] == "artifact":
            shutil.rmtree((self.folder / entry["file"]).parent)

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
