"""Warnings as one line."""

from __future__ import annotations

import warnings
from typing import Any

import click


def show_warnings_as_lines() -> None:
    """From now on, show a warning as `warning: …` on stderr, and only those that are meant for users."""
    warnings.showwarning = _show


def _show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    # MLflow warns about missing type hints regardless of filters; the hints that it asks for would be wrong here.
    if category is UserWarning and "type hint" not in str(message):
        click.echo(f"warning: {message}", err=True)
