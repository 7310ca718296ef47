"""The rule that chooses a decision threshold, parsed from its text once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

from cxr.errors import UserError

USAGE = "youden, f1, sensitivity>=0.95, cost 5:1 (false negative : false positive), or a number"


class RuleKind(Enum):
    """What a rule optimises; `FIXED` is a given threshold."""

    YOUDEN = auto()
    F1 = auto()
    SENSITIVITY = auto()
    COST = auto()
    FIXED = auto()


@dataclass(frozen=True, slots=True)
class ThresholdRule:
    """A rule and the numbers it needs: `value` is the sensitivity or the fixed threshold, `false_negative` and
    `false_positive` are the costs. `text` is what the user wrote."""

    kind: RuleKind
    text: str
    value: float = 0.5
    false_negative: float = 1.0
    false_positive: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `UserError` for an invalid rule."""
        if text in ("youden", "f1"):
            return cls(RuleKind[text.upper()], text)
        if re.fullmatch(r"0?\.\d+", text):
            return cls(RuleKind.FIXED, text, float(text))
        if match := re.fullmatch(r"sensitivity>=([\d.]+)", text):
            return cls(RuleKind.SENSITIVITY, text, _sensitivity(text, match[1]))
        if match := re.fullmatch(r"cost (\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", text):
            costs = float(match[1]), float(match[2])
            if sum(costs) == 0:
                raise UserError(f"--threshold {text}: at least one of the two costs must be above 0")
            return cls(RuleKind.COST, text, 0.5, *costs)
        raise UserError(f"--threshold {text}: unknown; use {USAGE}")


def _sensitivity(text: str, number: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+", number) or not 0 < float(number) <= 1:
        raise UserError(f"--threshold {text}: the sensitivity must be above 0 and at most 1")
    return float(number)
