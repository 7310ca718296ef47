"""Tables that a verdict is decided from."""

from __future__ import annotations

import pandas as pd


def table_of(**seeds: list[float]) -> pd.DataFrame:
    """A table of strategies, each with the ROC-AUC of its seeds."""
    rows = {
        name: {"seeds": len(each), "roc_auc": sum(each) / len(each), "roc_auc_low": 0.9, "roc_auc_high": 0.99}
        | {"roc_auc_seeds": each}
        for name, each in seeds.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def pairs_of(*rows: tuple[str, str, float, float, float, float]) -> pd.DataFrame:
    """Pairs of strategies as (a, b, a - b, low, high, Holm's p)."""
    return pd.DataFrame(rows, columns=["a", "b", "difference", "low", "high", "p_holm"])
