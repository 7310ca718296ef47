"""What a training run returns."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from cxr.audit.checks import Finding
from cxr.data.load import Data
from cxr.evaluation.calibration import Calibration
from cxr.evaluation.report import Report
from cxr.network.freezing import FreezeProof
from cxr.network.weights import InitialWeights
from cxr.runs.reports import Reports
from cxr.training.loop import EpochRecord


@dataclass(frozen=True, slots=True)
class RunResult:
    """The initial weights that were used, the epochs, the reports on validation and test, and the cost of a run.

    `stressed` has the metrics of the stressed validation; `uses_before` is how often this test split was already
    evaluated in the tracking store; `seconds` is the wall time, `peak_memory` in MB; `findings` are the audit's.
    """

    run_id: str
    weights: InitialWeights
    records: list[EpochRecord]
    reports: Reports
    data: Data
    seconds: float
    peak_memory: float
    stressed: dict[str, float]
    uses_before: int = 0
    registered: str = "not registered"
    findings: tuple[Finding, ...] = ()

    @property
    def val(self) -> Report:
        """The report of validation."""
        return self.reports.val

    @property
    def test(self) -> Report:
        """The report of the held-out split."""
        return self.reports.test

    @property
    def calibration(self) -> Calibration:
        """The calibration fitted on validation."""
        return self.reports.calibration

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch."""
        return pd.DataFrame([record.row() for record in self.records])

    @property
    def best(self) -> EpochRecord:
        """The epoch whose checkpoint is the result: the lowest value of `select` over all phases."""
        return [record for record in self.records if record.improved][-1]

    @property
    def proofs(self) -> list[FreezeProof]:
        """One per phase."""
        return [record.proof for record in self.records if record.proof]
