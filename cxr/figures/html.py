"""A report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from cxr.audit.checks import Finding
from cxr.figures.style import Counts, Floats, Interval, save_png
from cxr.figures.vector import svg_of

DIGITS = 4
LONG = 40  # characters
WARNING = "Not for clinical use"
TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True)
class Number:
    """A metric from 0 to 1 that is shown large: its name, (value, low, high) with NaN for no interval, and a remark."""

    name: str
    interval: Interval
    remark: str = ""

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.interval[1:]).all())


@dataclass(frozen=True, slots=True)
class Matrix:
    """A confusion matrix: counts [k, k], or means of several, rows are the true class."""

    counts: Counts | Floats
    classes: Sequence[str]

    def cells(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """Each true class with (count, percent of that class) for every predicted class; NaN of an empty class."""
        whole = all(float(count).is_integer() for count in self.counts.flat)
        for name, row in zip(self.classes, self.counts.tolist(), strict=True):
            percents = [100 * count / sum(row) if sum(row) else float("nan") for count in row]
            yield name, [(f"{n:,.{0 if whole else 1}f}", percent) for n, percent in zip(row, percents, strict=True)]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page under a heading, in this order: texts, findings of an audit, notes, tables, confusion matrices,
    figures and commands. The keys of mappings are captions."""

    heading: str
    texts: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)

    def sorted_findings(self) -> list[Finding]:
        """Warnings first, then what is unclear."""
        return sorted(self.findings, key=lambda finding: (finding.ok, finding.conclusive))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        parts = (self.texts, self.findings, self.notes, self.tables, self.matrices, self.figures, self.commands)
        return not any(map(len, parts))


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says, from the verdict to the sections; `warnings` are what a reader must know before the numbers."""

    title: str
    verdict: str
    sections: Sequence[Section]
    subtitle: str = ""
    warnings: Sequence[str] = ()
    numbers: Sequence[Number] = ()


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
class _Picture:
    """A figure: as SVG, or as base64 of its PNG with its width in px."""

    caption: str
    svg: str | None
    png: str
    width: int


def html_page(page: Page) -> str:
    """One self-contained page, for light and dark screens of any width and for paper.

    All texts are plain: markup in them is shown as text. A table's index is shown unless it only counts the rows;
    numbers have about `DIGITS` significant digits; NaN is "n/a". Empty sections are left out. Figures are SVG in the
    page's colours (`svg_of`), those with images PNG; they are changed.
    """
    sections = [section for section in page.sections if not section.empty]
    return _environment().get_template(TEMPLATE).render(page=page, sections=sections, warning=WARNING)


def _environment() -> Environment:
    return template_environment("cxr.figures", {"picture": _picture, "table": _table, "rounded": _rounded}, html=True)


def template_environment(package: str, filters: Mapping[str, Callable[..., object]], *, html: bool) -> Environment:
    """The templates of a package, with further filters; what is filled into HTML is escaped."""
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment


def _picture(figure: Figure, caption: str) -> _Picture:
    width = round(figure.get_figwidth() * figure.dpi)
    if svg := svg_of(figure, caption):
        return _Picture(caption, svg, "", width)
    buffer = io.BytesIO()
    save_png(figure, buffer)
    return _Picture(caption, None, base64.b64encode(buffer.getvalue()).decode("ascii"), width)


def _table(table: pd.DataFrame, caption: str) -> _Table:
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
