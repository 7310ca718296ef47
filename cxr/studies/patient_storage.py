"""Optuna's storage in a database that may not answer for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from cxr.tracking.outage import RETRY, Outage

STORAGE = Outage(lambda: "Optuna's storage")  # of this process


class PatientStorage(RDBStorage):
    """`RDBStorage` whose calls wait for the database as `STORAGE` allows, those of the thread of heartbeats too.

    No worker is taken for dead before it had time for another heartbeat: during an outage it could send none.
    """

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's; if the answer was lost, the state is found as it was set."""
        attempts: list[int] = []

        def call() -> bool:
            attempts.append(1)
            try:
                return super(PatientStorage, self).set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if len(attempts) > 1 and self.get_trial(trial_id).state == state:
                    return True
                raise

        return STORAGE.ride_out(call)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        found = self._stale(study_id)
        if found:
            time.sleep((self.get_heartbeat_interval() or 0) + 2 * RETRY)
        return [trial for trial in self._stale(study_id) if trial in found] if found else []

    def _stale(self, study_id: int) -> list[int]:
        return STORAGE.ride_out(lambda: super(PatientStorage, self)._get_stale_trial_ids(study_id))


def _patient(name: str) -> Callable[..., Any]:
    asks = getattr(RDBStorage, name)

    def call(self: PatientStorage, *arguments: Any, **options: Any) -> Any:
        return STORAGE.ride_out(lambda: asks(self, *arguments, **options))

    call.__name__, call.__doc__ = name, asks.__doc__
    return call


# What Optuna's cache of a storage asks. A trial whose creation was committed and not answered is made twice; the first
# then has no heartbeat, and is ended as that of a dead worker.
for _name in (
    *("set_study_user_attr", "set_study_system_attr", "get_study_id_from_name", "get_study_name_from_id"),
    *("get_study_directions", "get_study_user_attrs", "get_study_system_attrs", "get_all_studies", "get_best_trial"),
    *("_create_new_trial", "_set_trial_param", "get_trial_id_from_study_id_trial_number", "get_trial", "_get_trials"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr", "record_heartbeat"),
):
    setattr(PatientStorage, _name, _patient(_name))
