"""The newest parent of a kind in the store in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cxr.tracking.reading import LoggedRun


def newest_parent(kind: str = "comparison") -> LoggedRun:
    """That of the latest start."""
    import mlflow

    from cxr.tracking.reading import LoggedRun

    found = mlflow.search_runs(
        experiment_names=["cxr"],
        filter_string=f"tags.`cxr.kind` = '{kind}'",
        order_by=["start_time DESC"],
        output_format="list",
    )
    return LoggedRun.of(found[0])
