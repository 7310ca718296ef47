"""README, guide and CONTRIBUTING: commands parse, links and named code exist, the README is short."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from cxr.cli import cli
from cxr.config import configure
from cxr.errors import UserError
from cxr.options import ENTRY_POINTS

ROOT = Path(__file__).parent.parent
GUIDE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDE]
MAX_WORDS = 1300
LAUNCHERS = {"uv", "cxr", "mlflow", "python", "torchrun"}
NUMBERS = {"DAYS": "30", "N": "2"}  # placeholders that stand for numbers
VALUED = {"--extra", "--group", "--nproc-per-node", "--with"}  # options of launchers that take a value
MLFLOW_RUN = {"-e", "-P", "--env-manager", "--experiment-name", "--run-id"}


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and of indented code blocks."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def table_commands(text: str) -> Iterator[str]:
    """Commands in the first column of a table."""
    yield from re.findall(r"^\| `(cxr [^`]+)` \|", text, re.MULTILINE)


def arguments_of(line: str) -> list[str]:
    """The words of a command line without comments and leading assignments; none for other lines."""
    first = next((word for word in line.split() if not re.match(r"[A-Z_]+=", word)), "")
    if first not in LAUNCHERS:
        return []
    words = shlex.split(line.split(" | ")[0].removesuffix("|"), comments=True)
    return words[words.index(first) :]


def without_launcher(words: list[str]) -> list[str]:
    """`uv run --extra x cxr …`, `python -m cxr …` and `torchrun … -m cxr …` -> `cxr …`; others unchanged."""
    while words and words[0] in ("uv", "torchrun", "python"):
        if words[:2] not in (["uv", "run"], ["torchrun", words[1]], ["python", "-m"]):
            return words
        rest = words[2:] if words[0] == "uv" else words[1:]
        while rest and rest[0].startswith("-"):
            rest = rest[2:] if rest[0] in VALUED else rest[1:]
        words = rest
    return words


COMMANDS = [
    words
    for page in PAGES
    for line in [*code_lines(page.read_text()), *table_commands(page.read_text())]
    if (words := without_launcher(arguments_of(line)))
]
OURS = [words for words in COMMANDS if words[0] == "cxr"]
RUNS = [words for words in COMMANDS if words[:2] == ["mlflow", "run"]]


def parse(words: list[str]) -> click.Context:
    """The context of a `cxr` command after parsing its arguments, without running it."""
    command: click.Command = cli
    names = iter(words)
    path = [next(names)]
    while isinstance(command, click.Group):
        path.append(next(names))
        assert path[-1] in command.commands, f"{' '.join(path)}: no such command"
        command = command.commands[path[-1]]
    return command.make_context(" ".join(path), [NUMBERS.get(word, word) for word in names])


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_cxr_command_parses(words: list[str]) -> None:
    context = parse(words)
    for config in ENTRY_POINTS.values():
        if words[1] == config.command:  # choices and bounds are checked by the dataclass
            configure(config, {name: value for name, value in context.params.items() if name not in ("first", "more")})


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_every_mlflow_run_names_an_entry_point_and_its_parameters(words: list[str]) -> None:
    assert words[2] == "."
    options = list(zip(words[3::2], words[4::2], strict=True))
    assert {name for name, _ in options} <= MLFLOW_RUN
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    entry = entry_points[dict(options).get("-e", "main")]
    given = dict(value.split("=", 1) for name, value in options if name == "-P")
    assert given.keys() <= entry["parameters"].keys()
    values = {name: parameter["default"] for name, parameter in entry["parameters"].items()} | given
    quoted = {name: shlex.quote(value) for name, value in values.items()}
    test_every_cxr_command_parses(without_launcher(shlex.split(entry["command"].format(**quoted))))


def test_enough_commands_were_found() -> None:
    assert len(OURS) >= 25
    assert len(RUNS) >= 5
    assert {words[1] for words in OURS} == set(cli.commands)


@pytest.mark.parametrize(
    "line",
    [
        "uv run cxr nothing",
        "uv run --extra onnx cxr train --wrong 1",
        "cxr train --epochs many",
        "uv run torchrun --nproc-per-node 2 -m cxr train --strategy nothing",
    ],
)
def test_an_invalid_command_is_detected(line: str) -> None:
    words = without_launcher(arguments_of(line))
    assert words[0] == "cxr"
    with pytest.raises((AssertionError, click.UsageError, UserError)):
        test_every_cxr_command_parses(words)


def test_every_script_and_module_named_in_a_command_exists() -> None:
    scripts = {word for words in COMMANDS for word in words if word.endswith(".py")}
    assert scripts
    assert {name for name in scripts if not (ROOT / name).is_file()} == set()
    modules = {words[0] for words in COMMANDS if words[0].startswith("cxr.")}
    assert modules
    assert all(importlib.util.find_spec(name) for name in modules)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_inside_the_repository_resolves() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    inside = [(page, link) for page, link in links if "://" not in link]
    assert len(inside) >= 35
    for page, link in inside:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_guide_page_is_linked_from_the_readme_and_the_index() -> None:
    names = {page.name for page in GUIDE} - {"README.md"}
    assert len(names) >= 8
    for index, prefix in ((ROOT / "README.md", "docs/"), (ROOT / "docs" / "README.md", "")):
        text = index.read_text()
        assert {name for name in names if f"]({prefix}{name}" not in text} == set()


def test_every_picture_is_shown_somewhere() -> None:
    shown = "".join(page.read_text() for page in PAGES)
    pictures = list((ROOT / "experiments" / "pictures").glob("*.png"))
    assert pictures
    assert [path.name for path in pictures if f"experiments/pictures/{path.name}" not in shown] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MAX_WORDS


def named_code() -> set[tuple[str, str]]:
    """(name, file) of each "`name` in `cxr/file.py`", and of each name in a table row that begins with a file."""
    found: set[tuple[str, str]] = set()
    for page in PAGES:
        text = page.read_text()
        for names, file in re.findall(r"((?:`\w+`(?:,| and)?\s+)+)in\s+`(cxr/[\w/]+\.py)`", text):
            found |= {(name, file) for name in re.findall(r"`(\w+)`", names)}
        for file, rest in re.findall(r"^\| `(cxr/[\w/]+\.py)` \|(.+)$", text, re.MULTILINE):
            found |= {(name, file) for name in re.findall(r"`(\w+)`", rest)}
    return found


def test_code_named_in_the_guide_exists_there() -> None:
    names = named_code()
    assert len(names) > 30
    assert {(name, file) for name, file in names if not re.search(rf"\b{name}\b", (ROOT / file).read_text())} == set()


def test_every_file_that_the_guide_names_exists() -> None:
    files = {file for page in PAGES for file in re.findall(r"`((?:cxr|tests|experiments)/[\w/.]+)`", page.read_text())}
    assert len(files) > 20
    assert {file for file in files if not (ROOT / file).exists()} == set()
