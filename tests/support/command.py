"""Runs the command line in the process of the test."""

from __future__ import annotations

import sys
import warnings

import pytest

from cxr import cli as command_line


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `cxr` and return its exit code."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` shows them its own way
    monkeypatch.setattr(sys, "argv", ["cxr", *arguments])
    try:
        command_line.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
