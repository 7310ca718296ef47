"""Colour and line breaks for what is printed to a terminal. Elsewhere it is the same text, plain."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import TextIO

BOLD, DIM, RED, GREEN, YELLOW, CYAN = ("1", "2", "31", "32", "33", "36")
_LINK = re.compile(r"(https?://\S+)")
# What a line begins with, after the name of a run and its colon if it has one -> the style of the line.
_STYLES = (
    (re.compile(r"(\S+: )?epoch .*\*$"), GREEN),
    (re.compile(r"(\S+: )?epoch "), DIM),
    (re.compile(r"(\S+: )?(note|audit|.* does not answer|waiting for)\b"), YELLOW),
    (re.compile(r"(\S+: )?error: "), RED),
    (re.compile(r"next: "), BOLD),
)


def has_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream is a terminal, and the user does not forbid colour (https://no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def styled(text: str, coloured: bool) -> str:
    """The lines of a text with the colours of their kinds; the text itself without colour."""
    return "\n".join(_styled(line) for line in text.split("\n")) if coloured else text


def _styled(line: str) -> str:
    style = next((style for pattern, style in _STYLES if pattern.match(line)), None)
    return _in(style, line) if style else _LINK.sub(lambda link: _in(CYAN, link[1]), line)


def _in(style: str, text: str) -> str:
    return f"\033[{style}m{text}\033[0m"


def wrapped(text: str, width: int) -> str:
    """The lines of a text, those wider than `width` broken between words; links stay whole, to be clicked or copied."""
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width or _LINK.search(line):
        return line
    lines = textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def show(text: str) -> None:
    """Print a text to standard output; where that is a terminal, in colour and broken between words."""
    if sys.stdout.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns)
    print(styled(text, has_colour(sys.stdout)), flush=True)
