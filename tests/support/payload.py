"""Code in a pickle, as a malicious weights file holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)
