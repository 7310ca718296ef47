"""Exceptions. `UserError` is for what the user can fix: printed as one line, exit code 2, no traceback."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Invalid input. The message says what is wrong, where, and how to fix it.

    It is one line whatever it quotes: characters that cannot be printed, such as ends of lines, are shown escaped.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class MachineError(UserError):
    """A tracking store or disk that cannot be used; different parameters would not help."""


class InUseError(UserError):
    """Another process is using the same run."""


class Stopped(BaseException):
    """SIGTERM was received: as after Ctrl-C, the run ends with status KILLED."""


class Pruned(BaseException):
    """A search pruned this run because others were better at the same step; it ends with status KILLED."""


class ChildError(Exception):
    """A run in another process failed for a reason that is no `UserError`; the message holds its traceback."""


class FreezeError(Exception):
    """A frozen parameter or buffer changed: a bug in the program, never caused by the input."""


def disk_full(error: BaseException) -> str | None:
    """What a full disk said, with the file if it is known; None for any other error.

    `shutil` gathers the errors of a folder's files in one that has no number.
    """
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return "No space left on device" if "No space left on device" in str(error) else None
