"""What a user reads of an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr.errors import MachineError, UserError


@given(st.text(st.characters()))
def test_an_error_is_one_printable_line_whatever_it_quotes(quoted: str) -> None:
    for kind in (UserError, MachineError):
        shown = str(kind(f"--resize {quoted}: unknown"))
        assert shown.isprintable()
        assert shown.splitlines() == [shown]


@pytest.mark.parametrize("text", ["--data-dir /Röntgen/肺: no such folder", "lr=1e-3 [0.1, 0.2] “quoted” …"])
def test_what_can_be_printed_stays_as_it_is(text: str) -> None:
    assert str(UserError(text)) == text


def test_an_end_of_line_is_shown_escaped() -> None:
    assert str(UserError("a\nb\x1b[31mc")) == r"a\nb\x1b[31mc"
