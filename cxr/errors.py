"""Exceptions. `UserError` is for what the user can fix: printed as one line, exit code 2, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Invalid input. The message says what is wrong, where, and how to fix it."""


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
