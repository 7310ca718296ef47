"""`cxr` and `python -m cxr`."""

from __future__ import annotations

from cxr.process import lean_process


def main() -> None:
    """Run the command line as the process's only work."""
    with lean_process():
        from cxr import cli  # not before: what modules register for the end must come later

        cli.main()


if __name__ == "__main__":
    main()
