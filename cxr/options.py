"""Configuration dataclasses -> click options and the text of MLproject. Nothing is written down twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from cxr.config import CompareConfig, CrossvalConfig, TrainConfig, TuneConfig
from cxr.parameters import default_of, spec_of, types_of

ROOT = Path(__file__).parent.parent
ENTRY_POINTS: dict[str, tuple[str, type[TrainConfig]]] = {
    "main": ("train", TrainConfig),
    "tune": ("tune", TuneConfig),
    "compare": ("compare", CompareConfig),
    "crossval": ("crossval", CrossvalConfig),
}
Command = Callable[..., Any]


def options(cls: type[TrainConfig]) -> Callable[[Command], Command]:
    """A decorator that adds an option for each parameter, spelled with hyphens or (as MLflow does) underscores.

    Choices and bounds are checked by the dataclass, so that scripts and the command line get the same message.
    """

    def decorate(command: Command) -> Command:
        types = types_of(cls)
        for item in reversed(_listed(cls)):
            spec = spec_of(item)
            spellings = dict.fromkeys([f"--{item.name.replace('_', '-')}", f"--{item.name}"])
            metavar = "|".join(spec.choices) if 0 < len(spec.choices) <= 4 else None
            text = spec.help + (f" ({', '.join(spec.choices)})" if len(spec.choices) > 4 else "")
            command = click.option(
                *spellings,
                item.name,
                type=types[item.name],
                default=default_of(item),
                metavar=metavar,
                show_default=True,
                help=text,
            )(command)
        return command

    return decorate


def _listed(cls: type[TrainConfig]) -> list[Field[Any]]:
    """The parameters that the command takes."""
    return [item for item in fields(cls) if item.name not in cls.without]


def render_mlproject() -> str:
    """The text of MLproject: an entry point for each long command, every parameter with its default."""
    lines = [
        "# Rendered from cxr/config.py by `python -m cxr.options`; a test compares. Do not edit.",
        "name: cxr",
        "conda_env: conda.yaml",
        "entry_points:",
    ]
    for name, (command, cls) in ENTRY_POINTS.items():
        lines += [f"  {name}:", "    parameters:", *_parameters(cls)]
        arguments = " ".join(f"--{item.name.replace('_', '-')} {{{item.name}}}" for item in _listed(cls))
        lines.append(f'    command: "python -m cxr {command} {arguments}"')
    return "\n".join(lines) + "\n"


def _parameters(cls: type[TrainConfig]) -> list[str]:
    """All are strings to MLflow: it would turn a `float` of 10 into 10.0, which is no number of epochs."""
    return [f'      {item.name}: {{type: string, default: "{default_of(item)}"}}' for item in _listed(cls)]


if __name__ == "__main__":
    (ROOT / "MLproject").write_text(render_mlproject())
