"""The classes of a problem, and which of them is the positive one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from cxr.errors import UserError

MAX_CLASSES = 50
_LONGEST = 100
_ENDS = ("low", "high", "sd", "seeds")  # what the names of intervals, deviations and lists of seeds end with


@dataclass(frozen=True, slots=True)
class Task:
    """Names of classes, in the order of their labels. Of two, the second is the positive one: it has label 1."""

    classes: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str], classes: str = "auto", positive: str = "auto") -> Self:
        """From the names that a data set has.

        `classes` lists them in order, separated by commas; `auto` sorts them. `positive` names the positive one of two;
        `auto` is the second. Raises `UserError` for fewer than two classes, and names that do not match.
        """
        found = sorted(set(names))
        if classes != "auto":
            found = _listed(classes, found)
        if not 2 <= len(found) <= MAX_CLASSES:
            raise UserError(f"{_joined(found)}: a classifier needs 2 to {MAX_CLASSES} classes; check the labels")
        if positive != "auto":
            found = _last(found, positive)
        _require_different(found)
        return cls(tuple(found))

    @property
    def binary(self) -> bool:
        """Whether there are two classes."""
        return len(self.classes) == 2

    @property
    def positive(self) -> str | None:
        """The positive class of two; None for more."""
        return self.classes[1] if self.binary else None

    @property
    def class_to_index(self) -> dict[str, int]:
        """Name -> label."""
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def slugs(self) -> tuple[str, ...]:
        """The names as they stand in the names of columns and metrics."""
        return tuple(slug(name) for name in self.classes)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names as they stand in the names of parameters, which version 0.1 wrote as they are."""
        return self.classes if self == KAGGLE else self.slugs

    def words(self) -> str:
        """A description for people."""
        return ", ".join(self.classes) + (f" (positive: {self.positive})" if self.binary else "")


def differ_in_case(names: Iterable[str]) -> list[str]:
    """The spellings of the first name that comes in several, different in case only; none if there is none."""
    spelled: dict[str, list[str]] = {}
    for name in names:
        spelled.setdefault(name.casefold(), []).append(name)
    return next((spelled[name] for name in sorted(spelled) if len(spelled[name]) > 1), [])


def slug(name: str) -> str:
    """`Pleural effusion` -> `pleural_effusion`."""
    return re.sub(r"\W+", "_", name.casefold()).strip("_")


def _require_different(names: list[str]) -> None:
    """Raise `UserError` for names that are the same, or nothing, in the names of columns."""
    counts = Counter(slug(name) for name in names)
    alike = [name for name in names if counts[slug(name)] > 1 or not 0 < len(slug(name)) <= _LONGEST]
    alike += [name for name in names if any(slug(name) == f"{slug(other)}_{end}" for other in names for end in _ENDS)]
    if alike:
        raise UserError(
            f"classes {_joined(alike)}: no metrics could be named after them; use names of at most {_LONGEST} "
            f"characters that differ in letters or digits, and not only by a last word of {', '.join(_ENDS)}"
        )


def _listed(classes: str, found: list[str]) -> list[str]:
    """The names that `--classes` lists, which must be those found."""
    listed = [name.strip() for name in classes.split(",")]
    unknown, missing = [sorted(set(a) - set(b)) for a, b in ((found, listed), (listed, found))]
    if unknown or missing or len(set(listed)) < len(listed):
        parts = [*([f"{_joined(missing)} not in the data"] * bool(missing))]
        parts += [f"{_joined(unknown)} in the data and not listed"] * bool(unknown)
        raise UserError(f"--classes {classes}: {'; '.join(parts) or 'a name twice'}; list each class once")
    return listed


def _last(found: list[str], positive: str) -> list[str]:
    if len(found) != 2 or positive not in found:
        raise UserError(f"--positive {positive}: must name one of the two classes; the data has {_joined(found)}")
    return [name for name in found if name != positive] + [positive]


def _joined(names: Iterable[str]) -> str:
    """The first few names."""
    every = list(names)
    return ", ".join(every[:5]) + (f" and {len(every) - 5} more" if len(every) > 5 else "") or "no class"


KAGGLE = Task(("NORMAL", "PNEUMONIA"))
SUBTYPES = Task(("NORMAL", "BACTERIA", "VIRUS"))
