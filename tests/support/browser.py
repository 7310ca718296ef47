"""Chromium as it is installed, for tests of pages."""

from __future__ import annotations

import html
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# The page is in a frame of the width to test, as windows have a least width; a script outside of it measures.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body><iframe srcdoc="{page}" style="width:{width}px;height:900px">
</iframe><pre></pre><script>
addEventListener("load", () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, root = page.documentElement;
  const scrolls = element => element.closest(".scroll") || element.closest("svg");
  const beyond = element => element.getBoundingClientRect().right > {width};
  const wide = [...page.body.querySelectorAll("*")].filter(element => !scrolls(element) && beyond(element));
  const found = {{
    width: root.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    ink: frame.contentWindow.getComputedStyle(page.body).color,
    drawn: [...page.querySelectorAll("svg, img")].map(e => e.getBoundingClientRect().height),
  }};
  document.querySelector("pre").textContent = JSON.stringify(found);
}});
</script>"""


@dataclass(frozen=True, slots=True)
class Seen:
    """How a page is laid out: its width and the elements that reach beyond it, colours, heights of its pictures."""

    width: int
    wide: list[str]
    background: str
    ink: str
    drawn: list[float]

    @property
    def contrast(self) -> float:
        """That of text and background, as WCAG 2 defines it."""
        lights = sorted((_luminance(color) for color in (self.background, self.ink)), reverse=True)
        return (lights[0] + 0.05) / (lights[1] + 0.05)


def _luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def chromium(folder: Path, *arguments: str) -> str:
    """What Chromium writes, with a profile of its own in `folder`."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    found = subprocess.run([*command, *arguments], capture_output=True, timeout=120, check=True)
    return found.stdout.decode()


def seen(page: str, width: int, folder: Path, *, dark: bool) -> Seen:
    """The page in a window of that width."""
    file = folder / "frame.html"
    file.write_text(FRAME.format(page=html.escape(page), width=width))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = chromium(folder, scheme, "--window-size=1600,1000", "--dump-dom", file.as_uri())
    found = re.search(r"<pre>(.*?)</pre><script>", dom, re.DOTALL)
    assert found, dom[-2000:]
    return Seen(**json.loads(html.unescape(found[1])))


def printed_pages(page: str, folder: Path) -> int:
    """On how many sheets of paper the page is printed."""
    source, paper = folder / "page.html", folder / "page.pdf"
    source.write_text(page)
    chromium(folder, "--no-pdf-header-footer", f"--print-to-pdf={paper}", source.as_uri())
    return len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
