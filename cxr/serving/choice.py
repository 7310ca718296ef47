"""A model that a person may choose on the page of `cxr demo`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Choice:
    """The URI of a model, what it is called, and what is known of it besides its package (name -> text).

    `phantoms` tells whether it was trained on phantoms, which are no X-rays.
    """

    uri: str
    name: str
    notes: dict[str, str] = field(default_factory=dict)
    phantoms: bool = False
