"""Derives click options and the text of MLproject from the configuration dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from cxr.config import (
    CommandConfig,
    CompareConfig,
    CrossvalConfig,
    ServeConfig,
    TrainCommand,
    TrainConfig,
    TuneConfig,
    parameters_of,
)
from cxr.parameters import default_of, option_name, parse, spec_of, text_of, types_of

ROOT = Path(__file__).parent.parent
ENTRY_POINTS: dict[str, type[CommandConfig]] = {
    "main": TrainCommand,
    "tune": TuneConfig,
    "compare": CompareConfig,
    "crossval": CrossvalConfig,
}
Command = Callable[..., Any]


class _Boolean(click.ParamType):  # type: ignore[type-arg]
    """`true` or `false`: an option with a value, because `mlflow run` passes a value for every parameter."""

    name = "boolean"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        try:
            return value if isinstance(value, bool) else bool(parse(value, bool))
        except ValueError:
            self.fail(f"{value}: unknown; choose one of true, false", param, ctx)


def options(cls: type[CommandConfig | ServeConfig], only: Collection[str] = ()) -> Callable[[Command], Command]:
    """A decorator that adds an option for each parameter, or for those in `only`.

    They are spelled with hyphens or (as MLflow does) underscores.

    Choices and bounds are checked by the dataclass, so that scripts and the command line get the same message.
    """

    def decorate(command: Command) -> Command:
        types = types_of(TrainConfig) | types_of(cls)
        chosen = [item for item in parameters_of(cls) if not only or item.name in only]
        for item in reversed(chosen):
            spec, kind = spec_of(item), types[item.name]
            spellings = dict.fromkeys([option_name(item.name), f"--{item.name}"])
            choices = ("true", "false") if kind is bool else spec.choices
            metavar = "|".join(choices) if 0 < len(choices) <= 4 else None
            text = spec.help + (f" ({', '.join(choices)})" if len(choices) > 4 else "")
            default = default_of(item)
            command = click.option(
                *spellings,
                item.name,
                type=_Boolean() if kind is bool else kind,
                default=text_of(default) if kind is bool else default,
                metavar=metavar,
                show_default=True,
                help=text,
            )(command)
        return command

    return decorate


def render_mlproject() -> str:
    """The text of MLproject: an entry point for each command that trains, every parameter with its default."""
    lines = [
        "# Rendered from cxr/config.py by `python -m cxr.options`; a test compares. Do not edit.",
        "name: cxr",
        "conda_env: conda.yaml",
        "entry_points:",
    ]
    for name, cls in ENTRY_POINTS.items():
        lines += [f"  {name}:", "    parameters:", *_parameters(cls)]
        arguments = " ".join(f"{option_name(item.name)} {{{item.name}}}" for item in parameters_of(cls))
        lines.append(f'    command: "python -m cxr {cls.command} {arguments}"')
    return "\n".join(lines) + "\n"


def _parameters(cls: type[CommandConfig]) -> list[str]:
    """All are declared as strings: as `float`, MLflow would turn 10 epochs into 10.0, which is invalid."""
    return [
        f'      {item.name}: {{type: string, default: "{text_of(default_of(item))}"}}' for item in parameters_of(cls)
    ]


if __name__ == "__main__":
    (ROOT / "MLproject").write_text(render_mlproject())
