"""A report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from cxr.figures.style import save_png

DIGITS = 4
LONG = 40  # characters
WARNING = "Not for clinical use"
TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class _Column:
    """A column with its cells as text, `None` where a value is missing; its cells may be the headings of the rows."""

    name: str
    css_class: str
    heads_rows: bool
    texts: list[str | None]


@dataclass(frozen=True, slots=True)
class _Table:
    caption: str
    columns: list[_Column]

    def rows(self) -> Iterator[list[tuple[_Column, str | None]]]:
        """Each row as (column, text) pairs."""
        for texts in zip(*(column.texts for column in self.columns), strict=True):
            yield list(zip(self.columns, texts, strict=True))


@dataclass(frozen=True, slots=True)
class _Image:
    """A figure as base64 of its PNG; `width` in px."""

    caption: str
    png: str
    width: int


def html_report(
    title: str,
    verdict: str,
    notes: Sequence[str],
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Figure],
) -> str:
    """One self-contained page: the verdict, notes, tables, and figures as PNG data.

    The keys of ``tables`` and ``figures`` are their captions. All texts are plain: markup in them is shown as text. A
    table's index is shown unless it only counts the rows; numbers have about `DIGITS` significant digits; NaN is "n/a".
    """
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=title,
            verdict=verdict,
            warning=WARNING,
            notes=list(notes),
            tables=[_table(caption, table) for caption, table in tables.items()],
            figures=[_image(caption, figure) for caption, figure in figures.items()],
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("cxr.figures"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _image(caption: str, figure: Figure) -> _Image:
    buffer = io.BytesIO()
    save_png(figure, buffer)
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    return _Image(caption, png, round(figure.get_figwidth() * figure.dpi))


def _table(caption: str, table: pd.DataFrame) -> _Table:
    index = table.index
    only_counts = isinstance(index, pd.RangeIndex) and index.name is None
    levels = range(0 if only_counts else index.nlevels)
    heads = [_column(str(index.names[i] or ""), list(index.get_level_values(i)), True) for i in levels]
    columns = [_column(str(name), list(table.iloc[:, i]), False) for i, name in enumerate(table.columns)]
    return _Table(caption, heads + columns)


def _column(name: str, values: Sequence[Any], heads_rows: bool) -> _Column:
    return _Column(name, _css_class(values), heads_rows, _texts(values))


def _css_class(values: Sequence[Any]) -> str:
    """Numbers are aligned right; long texts wrap, short ones do not."""
    if _numeric(values):
        return "number"
    return "long" if any(isinstance(value, str) and len(value) > LONG for value in values) else ""


def _texts(values: Sequence[Any]) -> list[str | None]:
    numbers = [float(value) for value in values if _is_number(value) and np.isfinite(value)]
    places = [_decimals(number) for number in numbers]
    whole = all(number.is_integer() for number in numbers)
    # With the same number of decimals the points align; magnitudes too far apart get their own.
    common = 0 if whole else min(places) if max(places) - min(places) <= 2 else None
    return [_text(value, common) for value in values]


def _text(value: Any, decimals: int | None) -> str | None:
    if _is_missing(value):
        return None
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple, np.ndarray)):
        return ", ".join(_text(part, None) or "n/a" for part in value)
    return _rounded(float(value), decimals) if _is_number(value) else str(value)


def _rounded(number: float, decimals: int | None) -> str:
    if not np.isfinite(number):
        return str(number)
    if decimals is None:
        decimals = 0 if number.is_integer() else _decimals(number)
    smallest = 10.0**-decimals
    if 0 < abs(number) < smallest / 2:  # a tiny p value is not 0
        return f"{'<' if number > 0 else '>-'}{smallest:.{decimals}f}"
    return f"{number:,.{decimals}f}"


def _decimals(number: float) -> int:
    return DIGITS if abs(number) < 10 else max(DIGITS - int(np.floor(np.log10(abs(number)))), 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (_is_number(value) and bool(np.isnan(value)))


def _numeric(values: Sequence[Any]) -> bool:
    known = [value for value in values if not _is_missing(value)]
    return bool(known) and all(_is_number(value) for value in known)
