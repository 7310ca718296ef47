"""Load and memory of the machine while a run is at work, by MLflow's monitors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cxr.tracking.outage import OUTAGE, reason_of
from cxr.tracking.tracker import MlflowTracker


@contextmanager
def system_metrics(tracker: MlflowTracker, resumed: bool) -> Iterator[None]:
    """Log them every ten seconds, or as MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says, while the block is at work.

    They go through the tracker: MLflow's own thread ends at the first call that the store does not answer.
    """
    monitor = _monitor(tracker, resumed)
    try:
        monitor.start()
        yield
    finally:
        monitor.finish()


def _monitor(tracker: MlflowTracker, resumed: bool) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    parent: Any = SystemMetricsMonitor  # untyped

    class Monitor(parent):  # type: ignore[misc]
        """Does not ask the store whether the run is still there."""

        def monitor(self) -> None:
            """Until the run ends, or cannot be logged to."""
            while self._collected():
                try:
                    self.publish_metrics(self.aggregate_metrics())
                except Exception as error:  # what the run itself logs next fails likewise, and says so
                    OUTAGE.say(f"no more system metrics of run {tracker.run_id}: {reason_of(error)}")
                    return

        def _collected(self) -> bool:
            """Whether the run is still at work once the samples of one entry are taken."""
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    return False
            return True

        def publish_metrics(self, metrics: dict[str, float]) -> None:
            """Under the names that MLflow's pages know."""
            node = f"{self.node_id}/" if self.node_id else ""
            tracker.metrics(
                {f"{self._metrics_prefix}{node}{name}": v for name, v in metrics.items()}, self._logging_step
            )
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()

    return Monitor(tracker.run_id, resume_logging=resumed)
