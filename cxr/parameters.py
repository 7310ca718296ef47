"""How a parameter is declared, checked and parsed."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, get_type_hints

from cxr.errors import UserError


@dataclass(frozen=True, slots=True)
class Spec:
    """The specification of one parameter, apart from its type and default.

    Bounds are inclusive, except `above`. `commands` are those that accept the parameter; empty means all. `search` is
    the search range, `log` whether to search on a logarithmic scale. `before` is the value of runs that were recorded
    before the parameter existed; None if it always did. `same` are values that give the same bits; the first of them
    stands for all.
    """

    help: str
    commands: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float | None = None
    above: float | None = None
    high: float | None = None
    search: tuple[float, float] | None = None
    log: bool = False
    before: Any = None
    same: tuple[str, ...] = ()


def param(default: Any, help: str, **spec: Any) -> Any:
    """A dataclass field that carries its `Spec` in the metadata."""
    return field(default=default, metadata={"spec": Spec(help, **spec)})


def spec_of(item: Field[Any]) -> Spec:
    """The `Spec` that `param` attached to a field."""
    spec = item.metadata["spec"]
    assert isinstance(spec, Spec)
    return spec


def option_name(name: str) -> str:
    """`lr_head` -> `--lr-head`."""
    return f"--{name.replace('_', '-')}"


def text_of(value: Any) -> str:
    """A parameter's value as it is written in MLproject and logged: `true`, not `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse(text: str, kind: type) -> Any:
    """The inverse of `text_of`. Raises ValueError for text that cannot be parsed."""
    if kind is not bool:
        return kind(text)
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


def check(name: str, value: Any, spec: Spec) -> None:
    """Raise `UserError` when the value is not among the choices or out of bounds."""
    option = option_name(name)
    if spec.choices and value not in spec.choices:
        raise UserError(f"{option} {value}: unknown; choose one of {', '.join(spec.choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{option} {value}: not a finite number")
    if spec.above is not None and value <= spec.above:
        raise UserError(f"{option} {value}: must be above {spec.above:g}")
    if spec.low is not None and value < spec.low:
        raise UserError(f"{option} {value}: must be at least {spec.low:g}")
    if spec.high is not None and value > spec.high:
        raise UserError(f"{option} {value}: must be at most {spec.high:g}")


def types_of(cls: type) -> dict[str, type]:
    """Name -> type of each parameter of a configuration class."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def default_of(item: Field[Any]) -> Any:
    """The default of a field; every parameter has one."""
    assert item.default is not MISSING
    return item.default
