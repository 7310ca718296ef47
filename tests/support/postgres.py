"""A PostgreSQL server of its own for a test or an experiment."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def programs() -> Path | None:
    """The folder with PostgreSQL's programs (`apt-get install postgresql`); None if there is none."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    known = next((place for place in places if (place / "initdb").exists()), None)
    return known or (Path(found).parent if found else None)


class Postgres:
    """A server that can be stopped and started again; `url` is that of the server, without a database.

    `settings` are further ones of the server, such as `-c fsync=off`.
    """

    def __init__(self, bin_folder: Path, settings: str = ""):
        port = 20_000 + os.getpid() % 20_000
        made = subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip()
        self.folder, self.url = Path(made), f"postgresql://cxr@127.0.0.1:{port}"
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses root
            shutil.chown(self.folder, "postgres", "postgres")
            self.user = {"user": "postgres", "group": "postgres", "cwd": "/"}
        self.options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} {settings}"
        self.control = [str(bin_folder / "pg_ctl"), "-D", f"{self.folder}/db", "-w", "-l", f"{self.folder}/log"]
        self._run([str(bin_folder / "initdb"), "-D", f"{self.folder}/db", "-U", "cxr", "-A", "trust"])
        self.start()

    def _run(self, command: Sequence[str]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **self.user)

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._run([*self.control, "-o", self.options, "start"])

    def stop(self, mode: str = "fast") -> None:
        """End its connections at once; `immediate` does not even write what is in memory."""
        self._run([*self.control, "-m", mode, "stop"])

    def remove(self) -> None:
        """Stop it for good."""
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)
