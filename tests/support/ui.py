"""MLflow's pages, served for a test."""

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
def mlflow_ui(store: str) -> Iterator[str]:
    """The address of `mlflow ui` on that store."""
    port = str(free_port())
    options = ["--backend-store-uri", store, "--port", port, "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "ui", *options]
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        for _ in range(120):
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
        server.terminate()
