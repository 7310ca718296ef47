"""Servers of pages, for a test or a picture."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import urlopen


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def served(*command: str) -> Iterator[str]:
    """The address of a server of this environment (`python -m …`), started on a free port and stopped at the end."""
    port = str(free_port())
    address = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", *command, "--port", port], env=os.environ, **quiet) as server:
        try:
            for _ in range(240):
                try:
                    urlopen(address, timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            server.terminate()


@contextmanager
def mlflow_ui(store: str) -> Iterator[str]:
    """The address of `mlflow ui` on that store."""
    with served("mlflow", "ui", "--backend-store-uri", store, "--workers", "1") as address:
        yield address
