"""How often decisions are right in parts of a split, such as the subtypes of pneumonia."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxr.evaluation.metrics import Interval, group_weights, percentile_bounds


@dataclass(frozen=True, slots=True)
class Subgroup:
    """A part of a split: its images and groups (patients), and the share of its images decided right, with the 95%
    interval (NaN for a single group)."""

    name: str
    images: int
    groups: int
    right: Interval


def by_subtype(table: pd.DataFrame, resamples: int = 1000) -> list[Subgroup]:
    """The subtypes in a predictions table, the largest first, by the decisions of the model.

    Intervals are those of the cluster bootstrap (`group_weights`), and exact where all images are decided alike.
    """
    parts = [_subgroup(str(name), part, resamples) for name, part in table.groupby("subtype")]
    return sorted(parts, key=lambda part: (-part.images, part.name))


def _subgroup(name: str, part: pd.DataFrame, resamples: int) -> Subgroup:
    right = (part["decision"] == part["label"]).to_numpy(np.float64)
    groups = list(part["group"])
    weights, count = group_weights(groups, resamples), len(set(groups))
    draws = {"right": weights @ right / weights.sum(1)}
    bounds = percentile_bounds(draws, {"right": count}, count)
    return Subgroup(name, len(part), count, (float(right.mean()), *bounds["right"]))
