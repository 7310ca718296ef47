"""A run that a parent hands to another process, and how that process tells what became of it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from cxr.config import TrainConfig
from cxr.errors import ChildError, Stopped, UserError
from cxr.runs.messages import Say
from cxr.runs.train import run_tracked
from cxr.tracking.nested import end
from cxr.tracking.reading import LoggedRun
from cxr.warning_lines import show_warnings_as_lines

Message = tuple[str, Any]  # finished; stopped; failed, with the error or its traceback


@dataclass(frozen=True, slots=True)
class Child:
    """A run to be trained: its name among its siblings, its configuration, its ID, and that of its parent."""

    name: str
    config: TrainConfig
    run_id: str
    parent: str

    def train(self, say: Say) -> None:
        """Train it, as `run_tracked`."""
        run_tracked(self.config, say, self.run_id, self.parent)

    def trained(self, say: Say) -> Message:
        """Train it, and say what became of it: nothing is raised."""
        try:
            self.train(say)
        except UserError as error:
            return "failed", error
        except (KeyboardInterrupt, Stopped):
            return "stopped", ""
        except Exception:
            return "failed", traceback.format_exc()
        return "finished", ""

    def require_finished(self, message: Message) -> None:
        """Raise what the other process could not: `UserError`, `ChildError` with its traceback, or `Stopped`."""
        kind, content = message
        if kind == "stopped":
            raise Stopped(self.name)
        if kind == "failed":
            raise content if isinstance(content, UserError) else ChildError(f"{self.name}:\n{content}")


def end_lost(child: Child, reason: str) -> None:
    """End the run of a process that is gone, unless it had ended."""
    if LoggedRun.open(child.run_id).status == "RUNNING":
        end(child.run_id, "KILLED", f"lost: {reason}")


def stores_in_use() -> tuple[str, str]:
    """(tracking URI, registry URI) of this process."""
    import mlflow

    return mlflow.get_tracking_uri(), mlflow.get_registry_uri()


def use_stores(stores: tuple[str, str]) -> None:
    """Log to the stores of the process that hands out the runs, and show warnings as it does."""
    import mlflow

    show_warnings_as_lines()
    mlflow.set_tracking_uri(stores[0])
    mlflow.set_registry_uri(stores[1])
