"""The one exception for what a user can mend: shown as one line, exit code 2, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do about it."""


class MachineError(UserError):
    """A store or disk that cannot be used: no other parameters would mend it."""


class InUseError(UserError):
    """Another process is at work on the same run."""


class Stopped(BaseException):
    """SIGTERM arrived: as with Ctrl-C, the run ends KILLED."""


class Pruned(BaseException):
    """A search gave this run up, because others were better at the same step: it ends KILLED."""


class FreezeError(Exception):
    """Something frozen moved: a defect of the program, never of the input."""
