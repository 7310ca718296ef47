"""Warnings as one line."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def show_warnings_as_lines() -> None:
    """From now on, show a warning as `warning: …` on stderr, and only those that are meant for users."""
    warnings.showwarning = _show


# MLflow warns about missing type hints regardless of filters; the hints that it asks for would be wrong here. The other
# one comes from torch's own thread for gradients, once, and means nothing.
_NOT_FOR_USERS = ("type hint", "Attempting to run cuBLAS")


def _show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    if category is UserWarning and not any(text in str(message) for text in _NOT_FOR_USERS):
        print(f"warning: {message}", file=sys.stderr)
