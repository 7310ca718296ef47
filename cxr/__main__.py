"""`python -m cxr`."""

from __future__ import annotations

from cxr.cli import main

main()
