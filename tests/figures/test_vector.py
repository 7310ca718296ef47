"""Figures as SVG inside a page."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import numpy as np
from matplotlib.figure import Figure
from plot_help import LABELS, PROBABILITIES

from cxr.figures import single as plots
from cxr.figures.style import drawn, save_png
from cxr.figures.vector import LARGEST, svg_of


def curve() -> Figure:
    return plots.roc_curve(LABELS, PROBABILITIES, (0.75, 0.5, 0.9), "A title")


def test_a_curve_is_small_has_its_texts_as_text_and_the_colours_of_the_page() -> None:
    figure = curve()
    save_png(figure, pixels := io.BytesIO())
    text = svg_of(figure, "roc") or ""
    assert len(text) < len(pixels.getvalue()) / 2
    root = ElementTree.fromstring(text)
    texts = [element.text for element in root.iter("text")]
    assert "false positive rate (1 - specificity)" in texts
    assert {"--blue", "--paper", "--grid", "--muted"} <= set(re.findall(r"var\((--[a-z]+)\)", text))
    assert "#0072b2" not in text
    assert "font-family" not in text


def test_the_title_is_left_to_the_page_with_its_space() -> None:
    root = ElementTree.fromstring(svg_of(curve(), "roc") or "")
    assert "A title" not in [element.text for element in root.iter("text")]
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    assert (left, width) == (0, round(72 * curve().get_figwidth(), 1))
    assert 15 < top < 40
    assert top + height == 72 * curve().get_figheight()


def test_the_same_figure_gives_the_same_text() -> None:
    assert svg_of(curve(), "roc") == svg_of(curve(), "roc") != svg_of(curve(), "another name")


def test_a_figure_is_drawn_in_pixels_once() -> None:
    figure = curve()
    save_png(figure, io.BytesIO())
    canvas = figure.canvas
    assert drawn(figure) is canvas
    save_png(figure, io.BytesIO())
    assert figure.canvas is canvas


def test_images_and_thousands_of_points_stay_pixels() -> None:
    assert svg_of(plots.image_grid(np.zeros((2, 8, 8), np.uint8), ["a", "b"], "images"), "images") is None
    figure = Figure()
    figure.subplots().plot(np.random.default_rng(0).normal(size=(3000, 2)), "o")
    assert len(svg_of(figure, "few") or "") < LARGEST
    figure = Figure()
    figure.subplots().plot(np.random.default_rng(0).normal(size=(LARGEST // 60, 2)), "o")
    assert svg_of(figure, "many") is None
