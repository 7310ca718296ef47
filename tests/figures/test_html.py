from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import seen
from matplotlib.figure import Figure
from PIL import Image
from visit import needs_chromium

from cxr.audit.checks import Finding
from cxr.figures.html import Matrix, Number, Section, html_page
from cxr.figures.html import Page as PageContent
from cxr.figures.vector import VARIABLES

HOSTILE = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "wbr"}


class Page(HTMLParser):
    """The tags, attributes, texts and table cells of a page; a tag closed out of turn is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, tag: str, name: str) -> list[str]:
        return [value for at, key, value in self.attributes if (at, key) == (tag, name)]


def figure() -> Figure:
    drawn = Figure(figsize=(2, 1), dpi=120)
    drawn.subplots().plot([1, 2])
    return drawn


def picture() -> Figure:
    drawn = Figure(figsize=(2, 1), dpi=120)
    drawn.subplots().imshow(np.eye(3))
    return drawn


def html_report(
    title: str,
    verdict: str,
    notes: list[str],
    tables: dict[str, pd.DataFrame],
    figures: dict[str, Figure],
    matrices: dict[str, Matrix] | None = None,
) -> str:
    first = [Section("Notes", notes=notes), Section("Tables", tables=tables)]
    sections = [*first, Section("Decisions", matrices=matrices or {}), Section("Figures", figures=figures)]
    return html_page(PageContent(title, verdict, sections))


def cells(table: pd.DataFrame) -> list[str]:
    return Page(html_report("title", "verdict", [], {"table": table}, {})).cells


def test_report_leads_with_the_verdict_then_notes_tables_and_figures() -> None:
    table = pd.DataFrame({"AUC": [0.9]}, index=["full"])
    page = Page(html_report("Title", "full wins", ["a note"], {"Scores": table}, {"Curves": figure()}))
    order = ["Title", "full wins", "Not for clinical use", "a note", "Scores", "AUC", "Figure 1. Curves"]
    places = [page.text.rindex(part) for part in order]
    assert places == sorted(places)
    assert page.values("html", "lang") == ["en"]


def test_report_leaves_out_empty_sections() -> None:
    page = Page(html_report("Title", "verdict", [], {}, {}))
    assert not {"h2", "ul", "table", "img", "svg", "figure"} & set(page.tags)
    assert "Not for clinical use" in page.text


def test_report_shows_markup_of_its_inputs_as_text() -> None:
    table = pd.DataFrame({HOSTILE: [HOSTILE]}, index=pd.Index([HOSTILE], name=HOSTILE))
    drawn = figure()
    drawn.axes[0].set_title(HOSTILE)
    page = Page(html_report(HOSTILE, HOSTILE, [HOSTILE], {HOSTILE: table}, {HOSTILE: drawn}))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 11
    assert page.values("div", "aria-label") == [HOSTILE]


def test_report_does_not_treat_its_inputs_as_templates_or_entities() -> None:
    inputs = ["{{ 7 * 7 }}", "{% if %}", "{# c #}", "&lt;b&gt;"]
    table = pd.DataFrame({text: [text] for text in inputs})
    page = Page(html_report(inputs[0], inputs[1], inputs, {inputs[2]: table}, {}))
    assert page.cells == inputs * 2
    assert all(page.text.count(text) >= 3 for text in inputs)


def test_report_does_not_fill_placeholders_in_its_inputs() -> None:
    page = Page(html_report("$body", "$warning ${title}", ["$verdict"], {}, {}))
    assert "$warning ${title}" in page.text
    assert "$verdict" in page.text


def test_report_needs_nothing_from_elsewhere() -> None:
    html = html_report("Title", "verdict", ["note"], {"t": pd.DataFrame({"a": [1]})}, {"f": figure(), "p": picture()})
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert all(source.startswith("data:image/png;base64,") for source in page.values("img", "src"))
    assert not re.search(r"https?:|url\([^#]|@import|src=\"/", html)


def test_figures_are_svg_and_those_of_images_png_at_their_size() -> None:
    page = Page(html_report("Title", "verdict", [], {}, {"first": figure(), "second": picture(), "third": figure()}))
    assert page.values("svg", "width") == ["192", "192"]
    (source,) = page.values("img", "src")
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
    assert image.size == (240, 120)
    assert "Software" not in image.info
    assert page.values("img", "width") == ["240"]
    assert page.values("img", "alt") == ["second"]
    assert "Figure 3. third" in page.text


def test_names_inside_figures_do_not_clash() -> None:
    page = Page(html_report("Title", "verdict", [], {}, {"first": figure(), "second": figure()}))
    names = [value for _, name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names)) > 0
    used = {value for _, name, value in page.attributes if name == "href"}
    assert used
    assert used <= {f"#{name}" for name in names}


def test_every_colour_of_a_figure_is_defined_for_light_and_for_dark() -> None:
    html = html_report("Title", "verdict", [], {}, {})
    light, dark = (re.findall(r"--([a-z-]+): #", part) for part in html.split("@media screen and (prefers")[:2])
    assert set(VARIABLES.values()) <= set(light)
    assert set(light) == set(dark)


def test_a_page_shows_numbers_with_their_intervals_and_findings_by_weight() -> None:
    findings = [Finding("size", True, "fine"), Finding("age", True, "unknown", False), Finding("copies", False, "two")]
    numbers = [Number("recall", (0.9, 0.85, 0.95), "at 0.4"), Number("ece", (0.1, np.nan, np.nan))]
    sections = [Section("Audit", findings=findings), Section("Empty"), Section("Use", commands={"Shell": "cxr <b>"})]
    page = Page(html_page(PageContent("Title", "verdict", sections, "sub", ["not real"], numbers)))
    order = ["sub", "verdict", "not real", "0.900", "95%: 0.850 to 0.950; at 0.4", "no interval", "warning", "copies"]
    places = [page.text.index(part) for part in [*order, "unclear", "age", "ok", "size", "Shell", "cxr <b>"]]
    assert places == sorted(places)
    assert "Empty" not in page.text
    assert page.values("span", "style") == ["left: 85.0%; width: 10.0%", "left: 90.0%", "left: 10.0%"]


def test_confusion_matrices_are_tables_of_counts_and_percents() -> None:
    counts = np.array([[1500, 500], [0, 0]])
    section = Section("Decisions", matrices={"counts": Matrix(counts, "ab"), "means": Matrix(counts / 8, "ab")})
    page = Page(html_page(PageContent("Title", "verdict", [section])))
    assert [cell for cell in page.cells if "%" in cell or "n/a" in cell] == [
        *("1,500 75.0%", "500 25.0%", "0 n/a", "0 n/a"),
        *("187.5 75.0%", "62.5 25.0%", "0.0 n/a", "0.0 n/a"),
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.98765432, 0.5, 1.0], ["0.9877", "0.5000", "1.0000"]),
        ([95.1234, 1234.5678], ["95.1", "1,234.6"]),
        ([1026, 11177538], ["1,026", "11,177,538"]),
        ([3.0, np.nan], ["3", "n/a"]),
        ([0.00001, -0.00001, 0.0, 0.5], ["<0.0001", ">-0.0001", "0.0000", "0.5000"]),
        ([0.98765, 11177538.0], ["0.9877", "11,177,538"]),
        ([np.inf, 0.25], ["inf", "0.2500"]),
        ([True, False], ["yes", "no"]),
        ([[0.98765, np.nan], []], ["0.9877, n/a", ""]),
        (["text", None], ["text", "n/a"]),
        ([None, None], ["n/a", "n/a"]),
        ([pd.NA, pd.NaT], ["n/a", "n/a"]),
    ],
)
def test_tables_round_numbers_and_name_what_is_missing(values: list[object], expected: list[str]) -> None:
    assert cells(pd.DataFrame({"value": pd.Series(values)})) == ["value", *expected]


def test_tables_align_numbers_with_their_heading() -> None:
    table = pd.DataFrame({"name": ["a"], "value": [0.5]}, index=pd.Index(["full"], name="strategy"))
    html = html_report("Title", "verdict", [], {"table": table}, {})
    assert '<th scope="col" class="number">value</th>' in html
    assert '<td class="number">0.5000</td>' in html
    assert "<td>a</td>" in html
    assert '<th scope="row">full</th>' in html


def test_tables_show_an_index_unless_it_only_counts() -> None:
    values = {"value": [0.5, 0.25]}
    assert cells(pd.DataFrame(values)) == ["value", "0.5000", "0.2500"]
    named = pd.DataFrame(values, index=["full", "frozen"])
    assert cells(named) == ["", "value", "full", "0.5000", "frozen", "0.2500"]
    pairs = pd.MultiIndex.from_tuples([("full", 1), ("frozen", 2)], names=["strategy", "seed"])
    assert cells(pd.DataFrame(values, index=pairs))[:6] == ["strategy", "seed", "value", "full", "1", "0.5000"]


def test_tables_without_rows_keep_their_headings() -> None:
    assert cells(pd.DataFrame({"a": [], "b": []})) == ["a", "b"]


def test_wide_tables_scroll_in_their_own_frame() -> None:
    html = html_report("Title", "verdict", [], {"wide": pd.DataFrame({f"c{i}": [0.5] for i in range(40)})}, {})
    assert html.index('<div class="scroll"') < html.index("<table>")
    assert ".scroll { overflow-x: auto;" in html


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_wide_tables_and_long_words_without_overflow(tmp_path: Path) -> None:
    wide = pd.DataFrame({f"column {i}": ["0.9700 [0.9551, 0.9812]"] for i in range(40)})
    matrix = Matrix(np.ones((20, 20)), [f"class {i}" for i in range(20)])
    word = "x" * 300
    html = html_report(word, word, [word], {word: wide}, {word: figure()}, {word: matrix})
    for width in (1400, 400):
        found = seen(html, width, tmp_path, dark=False)
        assert found.wide == []
        assert found.width <= width


def test_long_headings_may_break_after_underscores() -> None:
    html = html_report("Title", "verdict", [], {"table": pd.DataFrame({"balanced_accuracy": [0.5]})}, {})
    assert ">balanced_<wbr>accuracy</th>" in html
