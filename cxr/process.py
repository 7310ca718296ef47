"""How a process of `cxr` starts and ends.

The libraries that it loads make half a million objects. By default, Python's collector looks through all of them nine
times while they are made, and several times when the process ends: three seconds that find nothing.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Objects made between two collections of the youngest; collections until the next older ones are looked through.
THRESHOLDS = (20_000, 10, 10)


class _End:
    """Ends the process with `status`, if the block has ended in an orderly way, without taking libraries apart."""

    status: int | None = None

    def __call__(self) -> None:
        if self.status is None:
            return
        logging.shutdown()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # nobody reads any more, which Python reports
            return
        os._exit(self.status)


@contextmanager
def lean_process() -> Iterator[None]:
    """For all that a process does, from before the first heavy import on. Not for a process of which it is a part.

    What libraries have registered to be done at the end is done.
    """
    gc.set_threshold(*THRESHOLDS)
    end = _End()
    atexit.register(end)  # what is registered first is done last
    try:
        yield
    except SystemExit as stop:
        status = stop.code or 0
        end.status = status if isinstance(status, int) else None  # a text, which Python prints
        raise
    end.status = 0
