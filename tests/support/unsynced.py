"""Databases of tests need not survive a power cut; to wait for the disk takes a third of a search's time."""

from __future__ import annotations

import sqlite3

from sqlalchemy import Engine, event


def write_behind() -> None:
    """SQLite of this process leaves it to the operating system when to write. A killed process loses nothing."""

    @event.listens_for(Engine, "connect")
    def unsynced(connection: object, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")
