"""Code in a pickle, as in a malicious weights file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)
