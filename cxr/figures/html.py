"""A report as one HTML page that needs nothing else: no script, no font, no file, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Real
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

DIGITS = 4
LONG = 40  # characters
WARNING = "Not for clinical use"

# The colours are fixed, as the viewer around the page may be dark. A wide table scrolls in a frame of its own,
# as MLflow shows the page in a frame of about 900 px; on paper, where nothing scrolls, it gets smaller letters.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 884px; padding: 20px 10px 32px; box-sizing: border-box; background: #fff;
  color: #1c1c1c; font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 10px; }
h2 { font-size: 18px; margin: 30px 0 10px; padding-bottom: 4px; border-bottom: 1px solid #ccc; }
h1, p, li, figcaption, caption { overflow-wrap: anywhere; }
.verdict { margin: 0 0 10px; padding: 12px 16px; border-left: 5px solid #0072b2; background: #eef5fa;
  font-size: 17px; white-space: pre-line; }
.warning { margin: 0; font-weight: 600; color: #8a3b00; }
ul { padding-left: 22px; margin: 0; }
li { margin: 4px 0; }
.scroll { overflow-x: auto; margin: 0 0 22px; }
table { border-collapse: collapse; font-size: 13.5px; }
caption { text-align: left; font-weight: 600; font-size: 15px; padding: 4px 0 6px; }
th, td { padding: 5px 10px; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd; }
td.long { white-space: normal; min-width: 18em; }
thead th { white-space: normal; border-bottom: 2px solid #555; vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody tr:nth-child(even) { background: #f6f6f6; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.missing { color: #6a6a6a; }
figure { margin: 0 0 26px; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: 6px; font-size: 14px; color: #333; }
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: 2px 4px; }
  figure, tr, .verdict { break-inside: avoid; }
  h2, caption { break-after: avoid; }
}
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="verdict">$verdict</p>
<p class="warning">$warning.</p>
</header>
<main>
$body
</main>
</body>
</html>
""")


def html_report(
    title: str,
    verdict: str,
    notes: Sequence[str],
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Figure],
) -> str:
    """One self-contained page: the verdict, notes, tables, and figures as PNG data.

    The keys of ``tables`` and ``figures`` are their captions. All texts are plain: markup in them is shown as such.
    A table's index is shown unless it only counts the rows; numbers have about `DIGITS` digits, NaN is "n/a".
    """
    sections = {
        "Notes": [_notes(notes)] if notes else [],
        "Tables": [_table(caption, table) for caption, table in tables.items()],
        "Figures": [_figure(i, caption, figure) for i, (caption, figure) in enumerate(figures.items(), start=1)],
    }
    body = "\n".join(_section(name, parts) for name, parts in sections.items() if parts)
    return _PAGE.substitute(title=escape(title), verdict=escape(verdict), warning=WARNING, body=body)


def _section(name: str, parts: Sequence[str]) -> str:
    return f"<section>\n<h2>{name}</h2>\n{_lines(parts)}\n</section>"


def _lines(parts: Sequence[str]) -> str:
    return "\n".join(parts)


def _notes(notes: Sequence[str]) -> str:
    return f"<ul>\n{_lines([f'<li>{escape(note)}</li>' for note in notes])}\n</ul>"


def _figure(number: int, caption: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    # Matplotlib would sign the image with its version and address; without it, equal figures give equal pages.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width = round(figure.get_figwidth() * figure.dpi)
    image = f'<img src="data:image/png;base64,{data}" width="{width}" alt="{escape(caption)}">'
    return f"<figure>\n{image}\n<figcaption>Figure {number}. {escape(caption)}</figcaption>\n</figure>"


def _table(caption: str, table: pd.DataFrame) -> str:
    columns = _columns(table)
    head = "".join(f'<th scope="col"{_class(values)}>{_breakable(name)}</th>' for name, values, _ in columns)
    cells = [_cells(values, header) for _, values, header in columns]
    rows = [f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True)]
    # Focusable, so that the keys scroll it too.
    start = f'<div class="scroll" tabindex="0">\n<table>\n<caption>{escape(caption)}</caption>'
    return _lines([start, f"<thead><tr>{head}</tr></thead>", "<tbody>", *rows, "</tbody>\n</table>\n</div>"])


def _breakable(name: str) -> str:
    """A heading that may go on in the next line after each "_", as a long one would make its column too wide."""
    return escape(name).replace("_", "_<wbr>")


def _columns(table: pd.DataFrame) -> list[tuple[str, list[Any], bool]]:
    """The name, the values and whether they head the rows, for each index level that says something and column."""
    index = table.index
    counted = isinstance(index, pd.RangeIndex) and index.name is None
    levels = range(0 if counted else index.nlevels)
    heads = [(str(index.names[i] or ""), list(index.get_level_values(i)), True) for i in levels]
    return heads + [(str(name), list(table.iloc[:, i]), False) for i, name in enumerate(table.columns)]


def _cells(values: Sequence[Any], header: bool) -> list[str]:
    start, end = ('<th scope="row"', "</th>") if header else ("<td", "</td>")
    kind = _class(values)
    texts = _texts(values)
    return [
        f'{start}{kind}><span class="missing">n/a</span>{end}' if text is None else f"{start}{kind}>{escape(text)}{end}"
        for text in texts
    ]


def _class(values: Sequence[Any]) -> str:
    """Numbers are set to the right; long texts wrap, and short ones do not."""
    if _numeric(values):
        return ' class="number"'
    return ' class="long"' if any(isinstance(value, str) and len(value) > LONG for value in values) else ""


def _texts(values: Sequence[Any]) -> list[str | None]:
    numbers = [float(value) for value in values if _is_number(value) and np.isfinite(value)]
    places = [_decimals(number) for number in numbers]
    whole = all(number.is_integer() for number in numbers)
    # One number of decimals aligns the column's points, unless the magnitudes are too far apart for one to suit all.
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
    if 0 < abs(number) < smallest / 2:  # a tiny p-value is not 0
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
