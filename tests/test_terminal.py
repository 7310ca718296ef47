"""Colour in a terminal, and plain text elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr.terminal import CYAN, DIM, GREEN, RED, YELLOW, has_colour, show, styled, wrapped

ESCAPES = re.compile("\033\\[\\d+m")


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("line", "style"),
    [
        ("epoch  0 top   loss 0.5 / val 0.4  *", GREEN),
        ("frozen-s0: epoch  1 top   loss 0.5 / val 0.6", DIM),
        ("note: validation is saturated", YELLOW),
        ("MLflow at http://server does not answer (refused)", YELLOW),
        ("frozen-s0: error: the disk is full", RED),
        ("look: http://127.0.0.1:5000/#/x", CYAN),
    ],
)
def test_a_line_has_the_colour_of_its_kind(line: str, style: str) -> None:
    assert f"\033[{style}m" in styled(line, coloured=True)


@given(st.text())
def test_colour_changes_no_text(text: str) -> None:
    assert styled(text, coloured=False) == text
    assert ESCAPES.sub("", styled(text, coloured=True)) == ESCAPES.sub("", text)


@given(st.text(st.sampled_from("ab :/\n")), st.integers(10, 40))
def test_lines_are_broken_between_words_only(text: str, width: int) -> None:
    shown = wrapped(text, width)
    assert shown.split() == text.split()
    assert all(len(line) <= width or " " not in line.strip() for line in shown.split("\n"))


def test_a_link_is_not_broken_and_a_short_line_stays_as_it_is() -> None:
    link = "look: http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=cxr-runs"
    table = "roc_auc       0.9286 [0.8691, 0.9767]"
    assert wrapped(f"{link}\n{table}", 40) == f"{link}\n{table}"
    assert wrapped("audit: warnings for class balance", 20) == "audit: warnings for\n  class balance"


def test_only_a_terminal_that_allows_it_has_colour() -> None:
    assert has_colour(Terminal(), {"TERM": "xterm"})
    assert not has_colour(Terminal(), {"NO_COLOR": "1"})
    assert not has_colour(Terminal(), {"TERM": "dumb"})
    assert not has_colour(io.StringIO(), {})


def test_what_is_piped_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    show("epoch  0  *")
    assert capsys.readouterr().out == "epoch  0  *\n"
